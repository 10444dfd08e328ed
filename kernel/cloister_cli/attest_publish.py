"""`cloister attest publish`: sign the reference values of a released image."""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Annotated

import typer
from pydantic import TypeAdapter, ValidationError

from cloister.profile import load_ed25519, read_bounded
from cloister_attest.outcome import EvidenceError
from cloister_attest.reference_values import (
    ImageValues,
    Publisher,
    ReferenceValues,
    sign_reference_values,
    verify_reference_values,
)
from cloister_cli.output import note, say
from cloister_data.errors import ConfigurationError, StorageError

MAX_VALUES = 256 << 10
DAY = 86400
_CHUNK = 1 << 20
_VALUES = TypeAdapter(tuple[ImageValues, ...])


def publish(
    values: Annotated[
        Path,
        typer.Argument(
            help="What the image measures: a JSON array of objects with platform, and measurement or mr_td and rtmr0 "
            "to rtmr3.",
            metavar="VALUES",
            show_default=False,
        ),
    ],
    artifact: Annotated[
        Path, typer.Option("--artifact", help="The image's file, whose digest the statement names.", metavar="FILE")
    ],
    image: Annotated[str, typer.Option("--image", help="The image's name, as trust files have it.", metavar="NAME")],
    version: Annotated[str, typer.Option("--version", help="The release, such as 1.4.2.", metavar="VERSION")],
    key: Annotated[Path, typer.Option("--key", help="The publisher's Ed25519 key (PEM, mode 0600).", metavar="FILE")],
    out: Annotated[Path, typer.Option("--out", help="Where to write the signed values.", metavar="FILE")],
    days: Annotated[int, typer.Option("--days", help="For how long they hold.", min=1, max=3650)] = 365,
    create_key: Annotated[bool, typer.Option("--create-key", help="Make the key where there is none.")] = False,
) -> None:
    """Sign which measurements a released image has, so that trust files that name the publisher go on working.

    The guard hands the file out with its evidence: reference_values = "FILE" in its configuration.
    """
    try:
        read = _VALUES.validate_json(read_bounded(values, limit=MAX_VALUES), strict=True)
        now = int(time.time())
        stated = ReferenceValues(image=image, version=version, issued=now, expires=now + days * DAY, values=read)
    except FileNotFoundError as error:
        raise typer.BadParameter(f"There is no file {values}.", param_hint="VALUES") from error
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigurationError(
            f"The reference values in {values} can't be signed.",
            why=f"{'.'.join(map(str, first['loc'])) or 'The document'}: {first['msg']}.",
            next_step='Write [{"platform": "sev-snp", "measurement": "..."}, ...]; `attest measure` computes them.',
        ) from error
    signer = load_ed25519(key, create=create_key, missing="Name the publisher's key, or make one: --create-key.")
    envelope = sign_reference_values(stated, _sha256(artifact), signer)
    public = signer.public_key().public_bytes_raw().hex()
    # What is handed out is what a client will accept.
    try:
        verify_reference_values(envelope, Publisher(key=public, image=image, minimum_version=version), now)
    except EvidenceError as error:
        raise ConfigurationError(
            f"No client would accept the reference values in {values}.",
            why=f"{str(error)[:1].upper()}{str(error)[1:]}.",
            next_step="Sign fewer values: leave out the shapes of machines on which nobody runs the image.",
        ) from error
    try:
        out.write_bytes(envelope)
    except OSError as error:
        raise StorageError(f"{out} can't be written.", why=f"{error.strerror}.") from error
    note(f'Written: {out}. A trust file that accepts it says, and publishes what `hardware` calls "published":')
    say("[publisher]")
    for name, value in (("key", public), ("image", image), ("minimum_version", version)):
        say(f"{name} = {json.dumps(value)}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
    except OSError as error:
        raise ConfigurationError(f"The image {path} can't be read.", why=f"{error.strerror}.") from error
    return digest.hexdigest()
