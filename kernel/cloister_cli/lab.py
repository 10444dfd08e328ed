"""`cloister lab`: JupyterLab with the cloister's kernel."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.output import say
from cloister_data.errors import ConfigurationError

OUTPUT_LIMITS = ("iopub_data_rate_limit=200000000", "iopub_msg_rate_limit=100000")
"""Bytes and messages a second: the kernel service bounds what a kernel's output takes."""


def lab(
    context: typer.Context,
    profile: ProfileOption = None,
    directory: Annotated[
        Path, typer.Option("--directory", help="Where the notebooks are.", file_okay=False, exists=True)
    ] = Path(),
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Open a browser.")] = True,
) -> None:
    """Verify the cloister, then open JupyterLab here; pick its kernel in the launcher.

    Further arguments go to JupyterLab.
    """
    require_lab()
    from cloister_kernel.kernelspec import install_kernelspec

    with open_chosen(profile) as session:
        known = session.profile
        install_kernelspec(known.name, f"Cloister: {known.name}")
        say(f"{known.url} is verified. In JupyterLab pick the kernel 'Cloister: {known.name}'.")
    arguments = lab_command(directory, browser=browser) + list(context.args)
    os.execv(arguments[0], arguments)  # noqa: S606 - JupyterLab takes this process's place, and its terminal


def require_lab() -> None:
    """Raises ConfigurationError where JupyterLab isn't installed."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise ConfigurationError(
            "JupyterLab isn't installed here.", next_step="Install it: pip install 'cloister[lab]'."
        )


def lab_command(directory: Path, *, browser: bool, open_file: str | None = None) -> list[str]:
    """JupyterLab over `directory`, by this Python."""
    command = [sys.executable, "-m", "jupyterlab", f"--ServerApp.root_dir={directory.resolve()}"]
    # What was printed while the laptop was away comes at once when it is back; by default Jupyter drops most of that.
    command += [f"--ZMQChannelsWebsocketConnection.{limit}" for limit in OUTPUT_LIMITS]
    if not browser:
        command.append("--no-browser")
    if open_file is not None:
        command.append(f"--LabApp.default_url=/lab/tree/{open_file}")
    return command
