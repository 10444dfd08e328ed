"""`cloister audit`: the tamper-evident log, its receipts and exports, verified with or without the cloister."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer
from tqdm import tqdm

from cloister import logexport, profile, receipts
from cloister.rendering import figure, share
from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_cli.audit_search import search
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.output import AsJson, note, print_json, print_table, say
from cloister_data.errors import ConfigurationError, InvalidRequestError
from cloister_data.release import Release, ReleaseList

app = typer.Typer(no_args_is_help=True, help="Search, export and verify the audit log and its receipts.")
app.command()(search)

TrustOption = Annotated[
    Path | None,
    typer.Option(
        "--trust",
        help="The trust file to judge the machine by. By default that of the profile that knows this log.",
        metavar="FILE",
    ),
]


@app.command()
def receipt(
    release: Annotated[str, typer.Argument(help="The release's id, or its first digits.", metavar="RELEASE")],
    out: Annotated[Path, typer.Option("--out", help="The file to write.", metavar="FILE")] = Path("receipt.json"),
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Save the receipt of one of your releases, with the evidence behind it. `cloister audit verify` checks it."""
    with open_chosen(profile) as session:
        found = _one(session.transport.call("GET", "/releases", None, ReleaseList).releases, release)
        file = receipts.fetch(session.transport, found.receipt)
    receipts.save(file, out)
    if as_json:
        print_json(file)
        return
    say(f"Saved the receipt of {found.title!r} ({found.release}) as {out}.")


@app.command()
def export(
    directory: Annotated[Path, typer.Argument(help="A directory that doesn't exist yet.", metavar="DIRECTORY")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Save the whole log (owners and admins): entries, names that you may know, evidence, signed checkpoint.

    Then verify it, which needs no cloister: `cloister audit verify DIRECTORY`.
    """
    with open_chosen(profile) as session, _progress(session.checkpoint.size, "exporting") as told:
        checkpoint = logexport.write(session, directory, told)
    if as_json:
        print_json({"directory": str(directory), "entries": checkpoint.size, "root": checkpoint.root.hex()})
        return
    say(f"Saved {checkpoint.size} entries in {directory}. Verify them: cloister audit verify {directory}")


@app.command()
def verify(
    path: Annotated[Path, typer.Argument(help="A receipt, or an export's directory.", metavar="PATH")],
    trust: TrustOption = None,
    as_json: AsJson = False,
) -> None:
    """Verify a receipt or an export offline: the machine's evidence, the signatures, the tree, and every balance.

    Exit status 1 where anything doesn't hold; for an export the first wrong entry is named.
    """
    if path.is_dir():
        _verify_export(path, trust, as_json)
    else:
        _verify_receipt(path, trust, as_json)


def _verify_receipt(path: Path, trust: Path | None, as_json: bool) -> None:
    file = receipts.load(path)
    found = file.receipt
    policy = _policy(trust, _origin(found.checkpoint))
    checkpoint = file.verify(policy)
    if as_json:
        facts = found.model_dump(mode="json", exclude={"entry", "inclusion", "checkpoint", "log_key"})
        print_json({"holds": True, **facts, "log": checkpoint.origin, "entries": checkpoint.size})
        return
    say(f"The receipt holds: {checkpoint.origin}, entry {found.leaf} of {checkpoint.size}.")
    sources = ", ".join(f"{each.dataset} version {each.version}" for each in found.sources)
    say(f"{found.user} asked about {sources} under policy " + ", ".join(str(s.policy_version) for s in found.sources))
    say(
        f"Mechanism {found.mechanism.kind}, epsilon {figure(found.epsilon)} at delta {found.delta:g}, adjacency "
        f"{found.adjacency}; {_when(found.issued)}; rollback {found.rollback}."
    )
    if found.simulated:
        say("SIMULATED hardware: not for real data.")


def _verify_export(directory: Path, trust: Path | None, as_json: bool) -> None:
    claimed = logexport.claimed(directory)
    policy, seen = _policy(trust, claimed.origin), _remembered(claimed.origin)
    with _progress(claimed.size, "verifying") as told:
        found = logexport.verify(directory, policy, seen, told)
    if as_json:
        print_json(
            {
                "holds": True,
                "log": found.checkpoint.origin,
                "entries": found.checkpoint.size,
                "root": found.checkpoint.root.hex(),
                "starts": found.starts,
                "simulated": found.simulated,
                "open_charges": found.open_charges,
                "accounts": [vars(each) for each in found.balances],
            }
        )
        return
    say(f"The log holds: {found.checkpoint.origin}, {found.checkpoint.size} entries, {found.starts} starts.")
    print_table(
        ["account", "limit", "delta", "used"],
        [
            [
                each.account,
                "-" if each.epsilon is None else figure(each.epsilon),
                "-" if each.delta is None else f"{each.delta:g}",
                share(each.used_share),
            ]
            for each in found.balances
        ],
        "It has no privacy accounts yet.",
    )
    if found.open_charges:
        say(f"{found.open_charges} charges are not settled yet.")
    if found.simulated:
        say("SIMULATED hardware: not for real data.")
    if seen is not None and seen.size > found.checkpoint.size:
        note(f"It is older than the log that this computer has seen, which had {seen.size} entries.")


def _policy(trust: Path | None, origin: str) -> AttestationPolicy:
    """The trust file that was named, or that of the profiles that know this log. Raises ConfigurationError."""
    if trust is not None:
        return load_policy(trust)
    files = {known.trust for known in _knowing(origin)}
    if len(files) == 1:
        return load_policy(files.pop())
    raise ConfigurationError(
        f"Which machine may have written the log {origin!r} isn't known on this computer."
        if not files
        else f"Several trust files on this computer are for the log {origin!r}.",
        why="Without a trust file the evidence can't be judged, and nothing else would mean anything.",
        next_step="Name it: cloister audit verify PATH --trust FILE.",
    )


def _knowing(origin: str) -> list[profile.Profile]:
    """The profiles that have seen this log."""
    found = []
    for name in profile.names():
        known = profile.load(name)
        seen = known.remembered()
        if seen is not None and seen.origin == origin:
            found.append(known)
    return found


def _remembered(origin: str) -> profile.Remembered | None:
    """The newest checkpoint of this log that any profile has seen."""
    seen = [known.remembered() for known in _knowing(origin)]
    return max((each for each in seen if each is not None), key=lambda each: each.size, default=None)


def _origin(checkpoint: str) -> str:
    """What a note calls its log; its signature is checked later."""
    return checkpoint.split("\n", 1)[0][:255]


def _one(found: tuple[Release, ...], wanted: str) -> Release:
    matching = [each for each in found if each.release.startswith(wanted)]
    if len(matching) != 1:
        raise InvalidRequestError(
            f"{len(matching)} of your releases begin with {wanted!r}.",
            next_step="Name one by its id: in a notebook, cloister.history() lists them.",
        )
    return matching[0]


@contextmanager
def _progress(total: int, what: str) -> Iterator[logexport.Told]:
    """A bar on a terminal; nothing where nobody looks."""
    with tqdm(total=total, unit=" entries", desc=what, disable=None, leave=False) as bar:

        def told(done: int) -> None:
            bar.update(done)

        yield told


def _when(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")
