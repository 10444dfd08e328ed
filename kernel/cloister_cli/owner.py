"""`cloister owner`: the owner's keys, and the witness without which nobody gets at the owner's data."""

from __future__ import annotations

import signal
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from cloister import profile as profiles
from cloister.mirror import write_bundle
from cloister.witness import Witness, WitnessKeys, keys_of, opened, witness_directory
from cloister_cli.choose import ProfileOption, chosen_profile, open_chosen
from cloister_cli.output import AsJson, print_error, print_json, say
from cloister_data.errors import CloisterError, ConfigurationError, InvalidRequestError
from cloister_data.owner import public_bytes, sign_gap, sign_terms, verify_terms
from cloister_data.terms import Gap, GapStatement, OwnerTerms, OwnerView, TermsRequest
from cloister_data.witness import unlock_digest

app = typer.Typer(no_args_is_help=True, help="Hold the keys to your data: signing key, witness, restores.")


@app.command()
def init(profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """Make your keys, and have the cloister pin them: run once, before the first upload.

    Your signing key speaks for you; the witness's keys open your data and sign for the audit log. From then on your
    data are open only while `cloister owner serve` runs, and an answer leaves only once it has signed for the entry.
    """
    with open_chosen(profile) as session:
        view = session.transport.call("GET", "/owner", None, OwnerView)
        owner_key = session.profile.owner_key(create=view.owner_key is None)
        keys = keys_of(session.profile, create=True)
        known = None if view.terms is None else verify_terms(view.terms, public_bytes(owner_key))
        if known is None or known.witness != keys.public:
            terms = OwnerTerms(
                origin=view.origin,
                owner=view.owner,
                version=1 if known is None else known.version + 1,
                witness=keys.public,
                unlock=unlock_digest(keys.unlock),
            )
            request = TermsRequest(owner_key=public_bytes(owner_key), terms=sign_terms(terms, owner_key))
            view = session.transport.call("PUT", "/owner", request, OwnerView)
        directory = session.profile.directory
    if as_json:
        print_json(_facts(view, keys))
        return
    say(f"{view.owner}'s signing key and witness are pinned at {view.origin}.")
    say(f"Keep copies in a safe place of {directory / 'owner.pem'} and the folder {keys.directory}.")
    say("Without the signing key nobody can speak for you; without unlock.key nobody can open your data, you neither.")
    say("Next: cloister owner serve, on a computer of yours that is always on. Then upload.")


@app.command()
def show(profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """Your keys, and what the cloister knows of them."""
    with open_chosen(profile) as session:
        view = session.transport.call("GET", "/owner", None, OwnerView)
        has_witness = (witness_directory(session.profile) / "witness.pem").exists()
        keys = keys_of(session.profile) if has_witness else None
    if as_json:
        print_json(_facts(view, keys))
        return
    pinned = "none yet" if view.owner_key is None else view.owner_key.hex()
    say(f"{view.owner} at {view.origin}: pinned key {pinned}.")
    if view.terms is None:
        say("No witness: a rollback is not prevented, and nobody but the cloister's machine can lock your data.")
    else:
        terms = OwnerTerms.from_json(view.terms.document)
        say(f"Witness {terms.witness.hex()}, by your terms version {terms.version}.")
        if keys is None or keys.public != terms.witness:
            say("Its key isn't on this computer.")
        say(f"It has signed for {view.cosigned} entries; your data are {'open' if view.unlocked else 'LOCKED'}.")
    if view.gap is not None:
        say(f"A restore waits for your signature ({_outline(view.gap)}): cloister owner accept")


@app.command()
def serve(
    profile: Annotated[
        list[str] | None,
        typer.Option(
            "--profile",
            help="Which cloister; more than once for several guards on one database. The first one's keys are used.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Witness for your data, until Ctrl-C. Keep it running: while it is silent your data are locked.

    It verifies the machine, checks every new entry of its audit log by your own copy, signs for it, and lends the
    machine the key to your data. It ends with exit status 1 where the log was set back, forked or edited.
    """
    chosen = [profiles.load(name) for name in profile] if profile else [chosen_profile(None)]
    first = chosen[0]
    owner = first.user
    if owner is None:
        raise ConfigurationError(f"Nobody has signed in with the profile {first.name!r}.", next_step="cloister connect")
    keys = keys_of(first)
    stop = threading.Event()
    failed: list[CloisterError] = []
    with opened(keys, owner) as mirror:
        threads = [
            threading.Thread(
                target=_witness, args=(Witness(each, keys, mirror, owner, _log), stop, failed), name=each.name
            )
            for each in chosen
        ]
        for name in (signal.SIGINT, signal.SIGTERM):
            signal.signal(name, lambda *_: stop.set())
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            for thread in threads:
                thread.join(0.2)
    if failed:
        raise failed[0]


@app.command()
def accept(
    profile: ProfileOption = None,
    yes: Annotated[bool, typer.Option("--yes", help="Sign without asking.")] = False,
    as_json: AsJson = False,
) -> None:
    """Sign for a restore of the cloister: your data can be asked again after it."""
    with open_chosen(profile) as session:
        view = session.transport.call("GET", "/owner", None, OwnerView)
        if view.gap is None:
            raise InvalidRequestError("No restore waits for your signature.", next_step="There is nothing to do.")
        if not as_json:
            say(f"The cloister was restored: {_outline(view.gap)}.")
            say("Every balance stands as the log says. Answers and models that were given out in the gap are gone.")
        if not yes:
            _confirm()
        statement = GapStatement(origin=view.origin, owner=view.owner, gap=view.gap)
        signed = sign_gap(statement, session.profile.owner_key())
        view = session.transport.call("POST", "/owner/restore", signed, OwnerView)
    if as_json:
        print_json(_facts(view, None))
        return
    say("Signed. Your data can be asked again.")


@app.command()
def backup(
    directory: Annotated[Path, typer.Argument(help="A directory that doesn't exist yet.", metavar="DIRECTORY")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Save your own copy of the audit log, for an operator who restores the cloister: cloister serve --restore."""
    chosen = chosen_profile(profile)
    checkpoint = write_bundle(witness_directory(chosen), directory)
    if as_json:
        print_json({"directory": str(directory), "entries": checkpoint.size, "root": checkpoint.root.hex()})
        return
    say(f"Saved {checkpoint.size} entries in {directory}. The operator starts with: cloister serve --restore")


def _witness(serving: Witness, stop: threading.Event, failed: list[CloisterError]) -> None:
    try:
        serving.serve(stop)
    except CloisterError as error:
        failed.append(error)
        print_error(error)
    finally:
        # One guard whose log is another one's is enough to sign for none.
        stop.set()


def _log(text: str) -> None:
    say(f"{datetime.now(UTC).strftime('%Y-%m-%d %H:%M:%S')} {text}")
    sys.stdout.flush()


def _confirm() -> None:
    if not sys.stdin.isatty():
        raise ConfigurationError(
            "Nobody has confirmed the restore.", why="There is no terminal to ask at.", next_step="Add --yes."
        )
    if not typer.confirm("Do you accept that?", err=True):
        raise ConfigurationError("The restore isn't accepted.", why="Your data stay closed to every request.")


def _outline(gap: Gap) -> str:
    lost = gap.end - gap.first
    return f"the backup had {gap.first} entries, and the {lost} after them were put back from a copy of the log"


def _facts(view: OwnerView, keys: WitnessKeys | None) -> dict[str, object]:
    terms = None if view.terms is None else OwnerTerms.from_json(view.terms.document)
    return {
        "owner": view.owner,
        "log": view.origin,
        "owner_key": view.owner_key.hex() if view.owner_key else None,
        "witness": terms.witness.hex() if terms else None,
        "terms_version": terms.version if terms else None,
        "witness_here": keys is not None and terms is not None and keys.public == terms.witness,
        "cosigned": view.cosigned,
        "unlocked": view.unlocked,
        "restore": view.gap.model_dump(mode="json") if view.gap else None,
    }
