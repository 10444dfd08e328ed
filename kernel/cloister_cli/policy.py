"""`cloister policy`: what an owner admits. Policies are signed here, on the owner's side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from cloister.rendering import day, figure
from cloister.session import Session
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.dataset import check_name
from cloister_cli.declare import load_policy, policy_toml
from cloister_cli.output import AsJson, print_json, print_table, say
from cloister_data.accounts import WhatIf
from cloister_data.datasets import PolicyView
from cloister_data.errors import ConfigurationError
from cloister_data.owner import public_bytes, sign_policy, verify_policy
from cloister_data.policy import Policy, SignedPolicy

app = typer.Typer(no_args_is_help=True, help="Show and set a dataset's policy.")

DatasetArgument = Annotated[str, typer.Argument(help="OWNER/NAME", metavar="DATASET")]


@app.command()
def show(dataset: DatasetArgument, profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """The policy in force, in the form that `cloister policy set` reads. Its signature is verified first."""
    check_name(dataset)
    with open_chosen(profile) as session:
        view = session.transport.call("GET", f"/datasets/{dataset}/policy", None, PolicyView)
    policy = _verified(view, dataset)
    if as_json:
        print_json({"policy": policy.model_dump(mode="json"), "owner_key": view.owner_key.hex()})
        return
    say(f"# signed by the owner's key {view.owner_key.hex()}")
    say(policy_toml(policy).rstrip())


@app.command("set")
def set_policy(
    dataset: DatasetArgument,
    file: Annotated[Path, typer.Argument(help="The policy (TOML).", metavar="FILE")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Replace a dataset's policy by the one in FILE, signed with your key (owners). It takes effect at once.

    `cloister policy show DATASET` prints the present one in the same form.
    """
    check_name(dataset)
    load_policy(file, dataset, 1)
    with open_chosen(profile) as session:
        signed = next_policy(session, dataset, file)
        answer = session.transport.call("PUT", f"/datasets/{dataset}/policy", signed, PolicyView)
    policy = signed.policy()
    if as_json:
        print_json({"policy": policy.model_dump(mode="json"), "owner_key": answer.owner_key.hex()})
        return
    say(f"The policy of {dataset} is now version {policy.version}.")


@app.command("what-if")
def what_if(
    dataset: DatasetArgument,
    file: Annotated[Path, typer.Argument(help="The draft (TOML).", metavar="FILE")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Which past requests would the policy in FILE have refused (owners)? Nothing is signed, nothing changes."""
    check_name(dataset)
    draft = load_policy(file, dataset, 1)
    with open_chosen(profile) as session:
        found = session.transport.call("POST", f"/datasets/{dataset}/what-if", draft, WhatIf)
    if as_json:
        print_json(found)
        return
    say(f"Of {found.requests} paid requests about {dataset}, this policy would have refused {found.refused}.")
    if found.changes:
        rows = [
            [day(each.created), each.user, each.operation, figure(each.epsilon), each.rule, each.reason]
            for each in found.changes
        ]
        print_table(["day", "user", "operation", "epsilon", "rule", "why"], rows, "")


def next_policy(session: Session, dataset: str, file: Path) -> SignedPolicy:
    """The policy in FILE as the dataset's next version, signed with the owner's key. Nothing is put in force yet."""
    view = session.transport.call("GET", f"/datasets/{dataset}/policy", None, PolicyView)
    key = session.profile.owner_key()
    if public_bytes(key) != view.owner_key:
        raise ConfigurationError(
            f"This computer's key isn't the one that {dataset} was published with.",
            why="Only that key can change the policy. Nothing was sent.",
            next_step="Use the computer, or the copy of the key, that published it.",
        )
    return sign_policy(load_policy(file, dataset, _verified(view, dataset).version + 1), key)


def _verified(view: PolicyView, dataset: str) -> Policy:
    policy = verify_policy(view.signed, view.owner_key)
    if policy.dataset != dataset:
        raise ConfigurationError(
            f"The cloister answered with a policy of {policy.dataset}, not of {dataset}.",
            next_step="Don't rely on it; tell the operator.",
        )
    return policy
