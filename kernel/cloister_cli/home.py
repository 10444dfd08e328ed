"""`cloister home`: what your kernels keep in a cloister, and the key that opens it."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from cloister_cli.choose import ProfileOption, chosen_profile, open_chosen
from cloister_cli.output import say
from cloister_data.errors import ConfigurationError
from cloister_data.kernels import KernelList

app = typer.Typer(no_args_is_help=True, help="Your home in a cloister: what your kernels keep between two days.")


@app.command()
def key(profile: ProfileOption = None) -> None:
    """Print the key that opens your home, to take along to another computer. Whoever has it and the disk reads it."""
    say(chosen_profile(profile).home_key())


@app.command()
def take(
    key_stdin: Annotated[bool, typer.Option("--key-stdin", help="Read the key from standard input.")] = False,
    profile: ProfileOption = None,
) -> None:
    """Use the key that `cloister home key` printed on your other computer."""
    found = sys.stdin.readline() if key_stdin else typer.prompt("The key", hide_input=True)
    chosen_profile(profile).take_home_key(found.strip())
    say("Kernels that you start from this computer open that home now.")


@app.command()
def wipe(
    yes: Annotated[bool, typer.Option("--yes", help="Don't ask.")] = False,
    profile: ProfileOption = None,
) -> None:
    """Delete your home in the cloister, for good. Your kernels there must have ended."""
    if not yes and not typer.confirm("Delete everything in your home in that cloister?"):
        raise ConfigurationError("Nothing was deleted.")
    with open_chosen(profile) as session:
        session.transport.call("DELETE", "/home", None, KernelList)
    say("Your home is empty.")
