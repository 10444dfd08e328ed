"""`cloister attest`: judge a machine's evidence without connecting, and get what that takes."""

from __future__ import annotations

import typer

from cloister_cli.attest_collateral import fetch_collateral
from cloister_cli.attest_measure import measure
from cloister_cli.attest_publish import publish
from cloister_cli.attest_trust import trust
from cloister_cli.attest_verify import verify

app = typer.Typer(no_args_is_help=True, help="Judge a machine's evidence offline, and get what that takes.")
app.command()(verify)
app.command()(trust)
app.command()(measure)
app.command()(publish)
app.command()(fetch_collateral)
