"""`cloister serve`: the guard and its kernel service, from one configuration file."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from cloister_data.errors import ConfigurationError


def serve(
    config: Annotated[
        Path, typer.Option("--config", help="The configuration, TOML; deploy/cloister.toml is a sample.")
    ],
    restore: Annotated[
        Path | None,
        typer.Option(
            "--restore",
            help="Start from a backup of the database: put back what it lacks from this copy of the audit log (a "
            "directory of `cloister owner backup` or `cloister audit export`).",
            metavar="DIRECTORY",
        ),
    ] = None,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration, then stop.")] = False,
) -> None:
    """Run a cloister: the guard over HTTPS, and the kernels beside it. Ctrl-C stops both."""
    try:
        from cloister_guard.config import load_config
        from cloister_guard.serve import run
    except ModuleNotFoundError as error:
        raise ConfigurationError(
            "This installation has no guard.",
            why=f"{error.name} is missing.",
            next_step="Install it: pip install 'cloister[guard]'.",
        ) from error
    loaded = load_config(config)
    loaded.writers()
    if check:
        typer.echo(f"{config}: good. It would listen on {loaded.listen} as {loaded.name} ({loaded.platform}).")
        return
    run(
        loaded,
        [
            sys.executable,
            "-P",
            "-m",
            "cloister_kernel.service",
            "--socket",
            os.fspath(loaded.service_socket),
            "--control",
            os.fspath(loaded.control_socket),
            "--homes",
            os.fspath(loaded.homes),
            "--runtime",
            os.fspath(loaded.runtime_dir),
            "--hide",
            os.fspath(loaded.state_dir),
            "--die-with-parent",
        ],
        restore,
    )
