"""Which cloister a command speaks to."""

from __future__ import annotations

from typing import Annotated

import typer

from cloister.profile import CONNECT, Profile, load, names
from cloister.session import Session
from cloister.session import open as open_session
from cloister_cli.output import busy
from cloister_data.errors import ConfigurationError

ProfileOption = Annotated[
    str | None,
    typer.Option(
        "--profile",
        "-p",
        envvar="CLOISTER_PROFILE",
        help="Which cloister, by the name it was connected under. Not needed where there is one.",
        metavar="NAME",
    ),
]


def chosen_profile(name: str | None) -> Profile:
    """The named profile, or the only one. Raises ConfigurationError."""
    if name is not None:
        return load(name)
    known = names()
    if len(known) == 1:
        return load(known[0])
    if not known:
        raise ConfigurationError("No cloister is known on this computer.", next_step=f"Connect first: {CONNECT}.")
    raise ConfigurationError(
        "Several cloisters are known on this computer.",
        why=f"They are: {', '.join(known)}.",
        next_step="Say which one: --profile NAME, or set CLOISTER_PROFILE.",
    )


def open_chosen(name: str | None) -> Session:
    """A verified session, signed in. The caller closes it."""
    profile = chosen_profile(name)
    with busy(f"Verifying {profile.url} ..."):
        return open_session(profile)
