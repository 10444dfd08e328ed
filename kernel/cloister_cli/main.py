"""The `cloister` command. Exit status: 0 done, 1 refused or failed, 2 a wrong command line."""

from __future__ import annotations

import sys
from importlib.metadata import version as installed_version
from typing import Annotated

import typer

from cloister_cli import attest, audit, budget, dataset, home, owner, policy, user
from cloister_cli.connect import connect
from cloister_cli.demo import demo
from cloister_cli.lab import lab
from cloister_cli.output import REFUSED, print_error
from cloister_cli.serve import kernels, serve
from cloister_data.errors import CloisterError

app = typer.Typer(
    name="cloister",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    help="Work from your own JupyterLab on data that you can never see.",
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"cloister {installed_version('cloister')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


SCIENTISTS, OWNERS, OPERATORS = "For data scientists", "For data owners", "For operators"

app.command(rich_help_panel=SCIENTISTS)(demo)
app.command(rich_help_panel=SCIENTISTS)(connect)
app.command(rich_help_panel=SCIENTISTS, context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(
    lab
)
app.add_typer(budget.app, name="budget", rich_help_panel=SCIENTISTS)
app.add_typer(home.app, name="home", rich_help_panel=SCIENTISTS)
app.add_typer(dataset.app, name="dataset", rich_help_panel=OWNERS)
app.add_typer(policy.app, name="policy", rich_help_panel=OWNERS)
app.add_typer(owner.app, name="owner", rich_help_panel=OWNERS)
app.add_typer(user.app, name="user", rich_help_panel=OPERATORS)
app.add_typer(attest.app, name="attest", rich_help_panel=OPERATORS)
app.add_typer(audit.app, name="audit", rich_help_panel=OPERATORS)
app.command(rich_help_panel=OPERATORS)(serve)
app.command(rich_help_panel=OPERATORS)(kernels)


def main() -> None:
    """Run the command line; errors are printed as what happened, why, and what to do next."""
    try:
        app()
    except CloisterError as error:
        print_error(error)
        sys.exit(REFUSED)
    except BrokenPipeError:
        # Whoever read the output has gone; that is their choice.
        sys.stderr.close()
        sys.exit(REFUSED)


if __name__ == "__main__":
    main()
