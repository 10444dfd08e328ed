"""The trust file: what a client demands of a machine before it sends anything."""

from __future__ import annotations

import json
import os
import stat
import tomllib
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import ConfigDict, Field, StringConstraints, ValidationError, model_validator

from cloister_data.base import Digest, Wire
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform

Measurement = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{96}$")]
"""SHA-384 in hex: 48 bytes, the size of SEV-SNP's MEASUREMENT and of TDX's MRTD."""

ChipId = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{128}$")]
"""64 bytes in hex, the size of SEV-SNP's CHIP_ID."""

LogKey = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Any = Literal["any"]

MAX_TRUST_FILE = 1 << 20
MAX_DOTS = 100


class AttestationPolicy(Wire):
    """A trust file. Every field is there, and accepts everything only by the explicit word "any".

    Attributes:
        platform: the only platform that is believed.
        roots: SHA-256 of the DER root certificates that may vouch for a report, or "vendor": the roots of the
            processor's maker that this program carries. There is no "any" here.
        measurements: the images that may run.
        debug: whether a machine that its host may debug, and so read, is refused.
        minimum_tcb: the lowest security version of the platform.
        chips_allowed, chips_denied: which processors may carry the machine.
        gpu: "required", "forbidden", or "any" where no GPU's evidence is looked at.
        log_key: the audit log's key, or "any": the key that the evidence itself binds.
        log_origin: the audit log's name, or "any".
    """

    model_config = ConfigDict(strict=True)

    format: Annotated[int, Field(ge=1, le=1)]
    platform: Platform
    roots: Annotated[tuple[Digest, ...], Field(min_length=1, max_length=16)] | Literal["vendor"]
    measurements: Annotated[tuple[Measurement, ...], Field(min_length=1, max_length=256)] | Any
    debug: Literal["forbidden", "any"]
    minimum_tcb: Annotated[int, Field(ge=0, lt=1 << 64)] | Any
    chips_allowed: Annotated[tuple[ChipId, ...], Field(min_length=1, max_length=4096)] | Any
    chips_denied: Annotated[tuple[ChipId, ...], Field(max_length=4096)]
    gpu: Literal["required", "forbidden", "any"]
    log_key: LogKey | Any
    log_origin: Annotated[str, StringConstraints(min_length=1, max_length=256)] | Any

    @model_validator(mode="after")
    def _no_vendor_of_simulations(self) -> Self:
        if self.platform == "simulated" and self.roots == "vendor":
            raise ValueError('simulated hardware has no vendor: "roots" must list its root certificates')
        return self

    @classmethod
    def from_toml(cls, text: str, name: str = "the trust file") -> Self:
        """Raises ConfigurationError that names the first wrong key."""
        try:
            _shallow(text)
            # Through JSON, where pydantic's strict mode knows arrays; TOML's dates have no place in a trust file.
            return cls.from_json(json.dumps(tomllib.loads(text)))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            # Only one rule spans several keys: the roots of simulated hardware.
            key = str(first["loc"][0]) if first["loc"] else "roots"
            raise ConfigurationError(
                f"The trust file {name} is wrong at {key!r}.",
                why=_reason(key, first["type"]),
                next_step='Every key must be there; "any" accepts everything where the key allows it.',
            ) from error
        except (tomllib.TOMLDecodeError, TypeError, ValueError, RecursionError) as error:
            raise ConfigurationError(
                f"The trust file {name} isn't TOML that this program reads.",
                why=f"{error}.",
                next_step="Ask the operator of the cloister for the file again.",
            ) from error

    def to_toml(self) -> str:
        """The file that `from_toml` reads back as the same policy."""
        lines = [
            "# What this client demands of the machine before it sends anything.",
            '# Every key must be there; "any" accepts everything.',
        ]
        # JSON's strings, numbers and arrays of strings are TOML's too.
        lines += [f"{key} = {json.dumps(value)}" for key, value in self.model_dump(mode="json").items()]
        return "\n".join(lines) + "\n"


def load_policy(path: Path) -> AttestationPolicy:
    """Read a trust file. Raises ConfigurationError that names the file and the first wrong key."""
    try:
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_mode & stat.S_IWOTH:
                raise ConfigurationError(
                    f"Anybody on this computer may change the trust file {path}.",
                    why="Whoever changes it decides which machine gets your password and your data.",
                    next_step=f"Compare it with the operator's, then close it: chmod o-w {path}.",
                )
            content = file.read(MAX_TRUST_FILE + 1)
        if len(content) > MAX_TRUST_FILE:
            raise ConfigurationError(f"The trust file {path} is larger than {MAX_TRUST_FILE} bytes.")
        return AttestationPolicy.from_toml(content.decode("utf-8"), str(path))
    except OSError as error:
        raise ConfigurationError(
            f"The trust file {path} can't be read.",
            why=f"{error.strerror}.",
            next_step="Name the operator's trust file: cloister connect URL --trust FILE.",
        ) from error
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"The trust file {path} isn't TOML.", why="It isn't UTF-8.") from error


_EXPECTED = {
    "format": "1",
    "platform": '"simulated", "sev-snp" or "tdx"',
    "roots": 'a list of SHA-256 digests in lower-case hex, or "vendor" for real hardware',
    "measurements": 'a list of 48-byte measurements in lower-case hex, or "any"',
    "debug": '"forbidden" or "any"',
    "minimum_tcb": 'a whole number from 0, or "any"',
    "chips_allowed": 'a list of 64-byte chip ids in lower-case hex that isn\'t empty, or "any"',
    "chips_denied": "a list of 64-byte chip ids in lower-case hex, which may be empty",
    "gpu": '"required", "forbidden" or "any"',
    "log_key": 'a 32-byte key in lower-case hex, or "any"',
    "log_origin": 'the log\'s name, or "any"',
}


def _shallow(text: str) -> None:
    """Raises ValueError for a key of many parts: tomllib's time grows with the square of their number."""
    if any(line.count(".") > MAX_DOTS for line in text.splitlines()):
        raise ValueError(f"a line has more than {MAX_DOTS} dots")


def _reason(key: str, kind: str) -> str:
    if kind == "extra_forbidden":
        return "There is no such key."
    return f"{'The key is missing: it' if kind == 'missing' else 'It'} must be {_EXPECTED.get(key, 'a TOML table')}."
