"""`cloister serve` and `cloister kernels`: the guard and its kernel service, from one configuration file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_data.errors import ConfigurationError, InvalidRequestError

if TYPE_CHECKING:
    from cloister_guard.config import GuardConfig

SERVICE = "cloister_kernel.service"
UNSAFE = "Don't confine kernels: to try Cloister out where a sandbox can't be had. Never for real data."


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
    kernels_apart: Annotated[
        bool,
        typer.Option(
            "--kernels-apart",
            help="Neither start nor end the kernel service: `cloister kernels` runs it, and it outlives this command.",
        ),
    ] = False,
    unsafe_no_sandbox: Annotated[bool, typer.Option("--unsafe-no-sandbox", help=UNSAFE)] = False,
    check: Annotated[bool, typer.Option("--check", help="Only check the configuration, then stop.")] = False,
) -> None:
    """Run a cloister: the guard over HTTPS, and the kernels beside it. Ctrl-C stops both.

    A guard that is killed leaves its kernels running: start it again within 15 minutes, and it takes them over.
    """
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
    if kernels_apart and unsafe_no_sandbox:
        raise InvalidRequestError("With --kernels-apart it is `cloister kernels` that takes --unsafe-no-sandbox.")
    options = service_options(loaded, unsafe_no_sandbox=unsafe_no_sandbox)
    run(loaded, None if kernels_apart else [sys.executable, "-P", "-m", SERVICE, *options], restore)


def kernels(
    config: Annotated[Path, typer.Option("--config", help="The cloister's configuration, as `cloister serve` has it.")],
    unsafe_no_sandbox: Annotated[bool, typer.Option("--unsafe-no-sandbox", help=UNSAFE)] = False,
) -> None:
    """Run the kernel service by itself, for `cloister serve --kernels-apart`. Ctrl-C ends its kernels."""
    from cloister_guard.config import load_config
    from cloister_kernel.service import main

    raise typer.Exit(main(service_options(load_config(config), unsafe_no_sandbox=unsafe_no_sandbox)))


def service_options(config: GuardConfig, *, unsafe_no_sandbox: bool) -> list[str]:
    """The kernel service's command line. Nothing secret: every user of the machine may see it."""
    options: dict[str, object] = {
        "socket": config.service_socket,
        "control": config.control_socket,
        "vault": config.homes,
        "runtime": config.runtime_dir,
        "hide": config.state_dir,
        "per-user": config.kernels_per_user,
        "total": config.kernels_total,
        "idle": config.kernel_idle_seconds,
        "memory-mb": config.kernel_memory_mb,
        "processes": config.kernel_processes,
        "home-mb": config.home_mb,
        "warm": config.kernel_pool,
    }
    if config.kernel_cpus is not None:
        options["cpus"] = config.kernel_cpus
    listed = [f"--{name}={value}" for name, value in options.items()]
    return [*listed, "--unsafe-no-sandbox"] if unsafe_no_sandbox else listed
