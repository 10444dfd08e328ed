"""`cloister budget`: what is used, what is left."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.accounts import NOT_A_SUM, who
from cloister.rendering import figure, share
from cloister.requests import HEADERS, request_rows
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.dataset import check_name
from cloister_cli.declare import load_policy
from cloister_cli.output import AsJson, note, print_json, print_table, say
from cloister_cli.plot import plot
from cloister_cli.policy import next_policy
from cloister_data.accounts import AccountHistory, AccountHistoryList, AccountList
from cloister_data.errors import InvalidRequestError
from cloister_data.requests import BudgetAnswer, BudgetRequest, BudgetRequestList, BudgetRequestView

app = typer.Typer(no_args_is_help=True, help="Show privacy budgets, and ask for more.")


@app.command()
def show(
    dataset: Annotated[
        str | None, typer.Argument(help="Only the accounts of this dataset's people.", metavar="[DATASET]")
    ] = None,
    plotted: Annotated[bool, typer.Option("--plot", help="Draw what was used over time, for each account.")] = False,
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """The accounts that concern you: limits, what is used, and the largest statistic that still fits."""
    with open_chosen(profile) as session:
        found = session.transport.call("GET", "/accounts", None, AccountList)
        histories: tuple[AccountHistory, ...] = ()
        if plotted:
            histories = session.transport.call("GET", "/accounts/history", None, AccountHistoryList).histories
    accounts = [each for each in found.accounts if dataset is None or dataset in each.datasets]
    if as_json:
        print_json(AccountList(accounts=tuple(accounts)))
        return
    divided = any(each.part is not None for each in accounts)
    print_table(
        [
            "population",
            *(["part"] if divided else []),
            "account",
            "limit",
            "delta",
            "used",
            "share",
            "held",
            "still fits",
        ],
        [
            [
                each.population,
                *([each.part or "-"] if divided else []),
                who(each),
                figure(each.limit.epsilon),
                f"{each.limit.delta:g}",
                figure(each.used),
                share(each.used_share),
                share(each.reserved_share),
                figure(each.fits),
            ]
            for each in accounts
        ],
        "No privacy account concerns you here.",
    )
    shown = {each.account: each for each in accounts}
    for history in histories:
        if history.account in shown:
            each = shown[history.account]
            part = "" if each.part is None else f" ({each.part})"
            say(f"\n{each.population}{part}, {who(each)}: share of epsilon {figure(each.limit.epsilon)} used")
            for line in plot(history.points):
                say(line)
    if accounts:
        note(NOT_A_SUM)


@app.command()
def request(
    dataset: Annotated[str, typer.Argument(help="OWNER/NAME", metavar="DATASET")],
    epsilon: Annotated[float, typer.Argument(help="How much more.", metavar="EPSILON", min=0, max=1000)],
    reason: Annotated[str, typer.Option("--reason", help="Why: the owner reads it.")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Ask a dataset's owner for a higher limit."""
    check_name(dataset)
    if not epsilon > 0 or not 0 < len(reason) <= 2000:
        raise InvalidRequestError(
            "A request says how much more, and why.",
            next_step="Give a positive EPSILON and a --reason of 2000 letters.",
        )
    wanted = BudgetRequest(dataset=dataset, epsilon=epsilon, reason=reason)
    with open_chosen(profile) as session:
        view = session.transport.call("POST", "/requests", wanted, BudgetRequestView)
    if as_json:
        print_json(view)
        return
    say(f"Asked {view.owner} for epsilon {figure(view.epsilon)} more on {view.dataset}. Request {view.request}.")


@app.command()
def requests(profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """Your requests for more; as an owner also those that were put to you."""
    with open_chosen(profile) as session:
        found = session.transport.call("GET", "/requests", None, BudgetRequestList)
    if as_json:
        print_json(found)
        return
    print_table(HEADERS, request_rows(found.requests), "There are no requests.")


@app.command()
def answer(
    request: Annotated[str, typer.Argument(help="The request's id, or its first digits.", metavar="REQUEST")],
    policy: Annotated[
        Path | None, typer.Option("--policy", help="Grant it by this policy (TOML), signed with your key.")
    ] = None,
    refuse: Annotated[str | None, typer.Option("--refuse", help="Refuse it; why.", metavar="REASON")] = None,
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Grant a request by the dataset's next policy, which takes effect at once, or refuse it (owners).

    `cloister policy show DATASET` prints the present policy in the form that --policy reads.
    """
    if (policy is None) == (not refuse):
        raise InvalidRequestError("Say one of the two: --policy FILE, or --refuse REASON.")
    with open_chosen(profile) as session:
        known = session.transport.call("GET", "/requests", None, BudgetRequestList).requests
        matching = [each for each in known if each.request.startswith(request)]
        if len(matching) != 1:
            raise InvalidRequestError(
                f"{len(matching)} requests begin with {request!r}.", next_step="List them: cloister budget requests."
            )
        found = matching[0]
        if policy is not None:
            load_policy(policy, found.dataset, 1)
            given = BudgetAnswer(granted=next_policy(session, found.dataset, policy))
        else:
            given = BudgetAnswer(refused=refuse)
        view = session.transport.call("POST", f"/requests/{found.request}/answer", given, BudgetRequestView)
    if as_json:
        print_json(view)
        return
    by = f" The policy of {view.dataset} is now version {view.policy_version}." if view.policy_version else ""
    say(f"The request of {view.user} is {view.state}.{by}")
