"""`cloister dataset`: what owners publish, and what is there."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister.columns import COLUMN_HEADERS, column_rows, part_list
from cloister.rendering import day
from cloister.session import Session
from cloister_cli.choose import ProfileOption, open_chosen
from cloister_cli.declare import load_policy, load_schema
from cloister_cli.output import AsJson, busy, note, print_json, print_table, say
from cloister_data.datasets import MAX_UPLOAD_BYTES, DatasetList, DatasetView, Declaration, PolicyView, UploadView
from cloister_data.errors import ConfigurationError, InvalidRequestError, NotFoundError, TooLargeError
from cloister_data.framing import pack_body
from cloister_data.owner import public_bytes, sign_policy, sign_statement
from cloister_data.populations import SignedStatement, statement_about
from cloister_data.schema import Schema

UPLOAD_TYPE = "application/vnd.cloister.upload"
FORMATS: dict[str, Literal["csv", "parquet"]] = {".csv": "csv", ".parquet": "parquet", ".pq": "parquet"}

app = typer.Typer(no_args_is_help=True, help="Publish and list datasets.")


@app.command()
def upload(
    file: Annotated[Path, typer.Argument(help="The rows: a CSV or Parquet file.", metavar="FILE")],
    schema: Annotated[Path, typer.Option("--schema", help="The public schema (TOML).")],
    name: Annotated[str | None, typer.Option("--name", help="OWNER/NAME; by default after you and the file.")] = None,
    policy: Annotated[
        Path | None, typer.Option("--policy", help="The policy (TOML); needed with the first version.")
    ] = None,
    population: Annotated[
        str | None,
        typer.Option(
            "--population",
            help="OWNER/NAME of the people the data are about; datasets about the same people must name the same. "
            "By default the dataset's own name.",
        ),
    ] = None,
    other_people: Annotated[
        bool,
        typer.Option(
            "--other-people",
            help="Sign that nobody in this new population is in any of your others (asked at a terminal).",
        ),
    ] = False,
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """Publish a dataset's first or next version (owners).

    The schema (TOML) has a table \\[\\[columns]] for each column: name, type (integer, real,
    category, boolean, date, text, tensor), and public bounds low and high, or categories.
    With privacy_unit it names the column that says whose row it is, and with partition one
    that divides these people for good, such as their site: requests about one part then cost
    the others nothing. It says in public how many people each part has.

    The policy (TOML) has population_limit (epsilon, delta), release_delta, epsilon_cap,
    operations, platforms, minimum_sandbox, transfers ("allowed" or "forbidden": files between
    laptops and kernels), expires (a date or "never"), and in a table
    \\[users] a limit for each user. Both are checked here before anything is sent; the policy
    is signed with your own key, which stays on this computer.
    """
    declared = load_schema(schema)
    data_format = _format(file)
    content = _read(file)
    with open_chosen(profile) as session:
        owner = session.profile.user or session.profile.name
        dataset = name or f"{owner}/{file.stem.lower().replace(' ', '-')}"
        answer = publish(
            session,
            dataset,
            declared,
            content,
            data_format,
            policy=policy,
            population=population or dataset,
            other_people=other_people,
        )
    if as_json:
        print_json(answer)
        return
    say(f"{answer.dataset}, version {answer.version}: {answer.rows} rows, {len(answer.columns)} columns, encrypted.")
    if answer.version == 1:
        path = session.profile.directory / "owner.pem"
        say(f"Your signing key is {path}. It alone can change the policy: keep a copy in a safe place.")


def publish(
    session: Session,
    dataset: str,
    schema: Schema,
    content: bytes,
    data_format: Literal["csv", "parquet"],
    *,
    policy: Path | None,
    population: str,
    other_people: bool = False,
) -> UploadView:
    """Send one version over a verified session; the first one carries the signed policy.

    Where it opens another population, the owner must say that its people are others: by `other_people`, or when asked.
    """
    first = _is_first(session, dataset)
    if first and policy is None:
        raise ConfigurationError(
            f"{dataset} is new, and a new dataset needs a policy.",
            why="It says who may ask what, and how much it may cost. Nothing was sent.",
            next_step="Write one and add: --policy FILE.",
        )
    if not first and policy is not None:
        raise ConfigurationError(
            f"{dataset} has a policy already.",
            why="A new version of the data keeps it. Nothing was sent.",
            next_step="Leave --policy out, and change the policy with: cloister policy set.",
        )
    # The key is made only at a first upload: otherwise a lost one would go unnoticed until the guard refuses.
    key = session.profile.owner_key(create=first)
    signed = sign_policy(load_policy(policy, dataset, 1), key) if policy is not None else None
    try:
        declaration = Declaration(
            dataset=dataset,
            population=population,
            data_schema=schema,
            data_format=data_format,
            owner_key=public_bytes(key),
            policy=signed,
            statement=_statement(session, population, key, stated=other_people) if first or other_people else None,
        )
    except ValueError as error:
        raise InvalidRequestError(
            f"{dataset!r} or {population!r} can't be a name.",
            why="Names are OWNER/NAME in lower-case letters, digits, '.', '_' and '-'.",
            next_step="Choose another: --name, --population.",
        ) from error
    body = pack_body(declaration.to_json(), content)
    with busy(f"Uploading {len(content) / 2**20:.1f} MiB ..."):
        return session.transport.call("POST", "/datasets", body, UploadView, UPLOAD_TYPE)


def _statement(session: Session, population: str, key: Ed25519PrivateKey, *, stated: bool) -> SignedStatement | None:
    """The signed statement that the people of a new population are others; None where there is nothing to state."""
    owner = population.split("/")[0]
    views = session.transport.call("GET", "/datasets", None, DatasetList).datasets
    known = sorted({view.population for view in views if view.owner == owner})
    if not known or population in known:
        if stated:
            raise ConfigurationError(
                f"{population} is no new population beside others, so there is nothing to state.",
                why="Its people have their accounts already." if known else "It is the first one.",
                next_step="Nothing was sent. Leave out --other-people.",
            )
        return None
    statement = statement_about(population, known)
    if not stated:
        _ask(population, ", ".join(known), statement.says)
    return sign_statement(statement, key)


def _ask(population: str, others: str, says: str) -> None:
    """Raises ConfigurationError unless somebody at a terminal confirms what the owner's key is about to sign."""
    if not sys.stdin.isatty():
        raise ConfigurationError(
            f"{population} would be a new population, with fresh accounts.",
            why=f"The people of {others} have accounts already. Nothing was sent.",
            next_step="If these are the same people, add --population NAME of theirs. If nobody is in both, add "
            "--other-people: it signs that statement.",
        )
    note(f"{population} is a new population: its people get accounts of their own, beside those of {others}.")
    note(f'Your key will sign: "{says}"')
    if not typer.confirm("Is that true?", err=True):
        raise ConfigurationError(
            f"{population} isn't opened.",
            why="The same people must not get a second budget. Nothing was sent.",
            next_step="Name the population that these people are in: --population NAME.",
        )


@app.command("list")
def list_datasets(profile: ProfileOption = None, as_json: AsJson = False) -> None:
    """The datasets that you may see."""
    with open_chosen(profile) as session:
        found = session.transport.call("GET", "/datasets", None, DatasetList)
    if as_json:
        print_json(found)
        return
    print_table(
        ["dataset", "version", "people", "of", "columns", "open for", "one request", "until"],
        [
            [
                view.name,
                str(view.version),
                str(view.units),
                view.population,
                str(len(view.data_schema.columns)),
                ", ".join(view.operations),
                f"epsilon {view.epsilon_cap:g}",
                "no end" if view.expires is None else day(view.expires),
            ]
            for view in found.datasets
        ],
        "No dataset is open to you here.",
    )


@app.command()
def show(
    dataset: Annotated[str, typer.Argument(help="OWNER/NAME", metavar="DATASET")],
    profile: ProfileOption = None,
    as_json: AsJson = False,
) -> None:
    """One dataset: its public schema and the outline of its policy."""
    check_name(dataset)
    with open_chosen(profile) as session:
        view = session.transport.call("GET", f"/datasets/{dataset}", None, DatasetView)
    if as_json:
        print_json(view)
        return
    say(f"{view.name}, version {view.version}: {view.units} people of {view.population}")
    if view.data_schema.description:
        say(view.data_schema.description)
    if view.part_units:
        say(f"Divided into parts with accounts of their own, {part_list(view)}.")
    say(
        f"Open for {', '.join(view.operations) or 'nothing'}; one request at most epsilon {view.epsilon_cap:g}; "
        f"your limit epsilon {view.limit.epsilon:g} at delta {view.limit.delta:g}."
    )
    prevented = "prevented by the owner's witness" if view.witness else "not prevented"
    say(f"A rollback is {prevented}.")
    if view.locked:
        say("LOCKED: the owner's witness is silent.")
    if view.simulated:
        say("SIMULATED hardware: not for real data.")
    print_table(list(COLUMN_HEADERS), column_rows(view.data_schema), "No columns.")


def check_name(dataset: str) -> None:
    """Raises InvalidRequestError unless it has the form of a dataset's name: it becomes part of a path."""
    from pydantic import TypeAdapter, ValidationError

    from cloister_data.base import DatasetName

    try:
        TypeAdapter(DatasetName).validate_python(dataset)
    except ValidationError as error:
        raise InvalidRequestError(
            f"{dataset!r} isn't a dataset's name.", next_step="Names are OWNER/NAME; see: cloister dataset list."
        ) from error


def _is_first(session: Session, dataset: str) -> bool:
    check_name(dataset)
    try:
        session.transport.call("GET", f"/datasets/{dataset}/policy", None, PolicyView)
    except NotFoundError:
        return True
    return False


def _format(file: Path) -> Literal["csv", "parquet"]:
    found = FORMATS.get(file.suffix.lower())
    if found is None:
        raise InvalidRequestError(
            f"{file} is neither CSV nor Parquet by its name.", next_step="Name it with .csv or .parquet."
        )
    return found


def _read(file: Path) -> bytes:
    try:
        if file.stat().st_size > MAX_UPLOAD_BYTES:
            raise TooLargeError(
                f"{file} has {file.stat().st_size / 2**30:.1f} GiB.",
                why=f"One upload holds at most {MAX_UPLOAD_BYTES >> 30} GiB.",
                next_step="Store it as Parquet, which is smaller, or publish it in parts.",
            )
        return file.read_bytes()
    except OSError as error:
        raise InvalidRequestError(
            f"{file} can't be read.", why=f"{error.strerror}.", next_step="Check the path."
        ) from error
