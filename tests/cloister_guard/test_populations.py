"""The same people get one budget, whatever their files are called: another population needs its owner's signed word."""

from __future__ import annotations

import hashlib
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from sqlalchemy import delete, func, select, text
from sqlalchemy.orm import Session

from cloister_budget.entries import LeafBody, PopulationOpened
from cloister_budget.tables import (
    Account,
    Dataset,
    DatasetVersion,
    Leaf,
    Owner,
    PolicyRow,
    Population,
    PopulationStatementRow,
)
from cloister_data.accounts import AccountList
from cloister_data.datasets import DatasetList, DatasetView, Declaration, PolicyView, UploadView
from cloister_data.errors import (
    CloisterError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    PolicyRefusedError,
    StorageError,
)
from cloister_data.framing import pack_body
from cloister_data.owner import public_bytes, sign_policy, sign_statement, verify_statement
from cloister_data.policy import POLICY_LABEL, SignedPolicy
from cloister_data.populations import MAX_OTHERS, POPULATION_LABEL, SignedStatement, statement_about
from cloister_guard.catalogue import Catalogue
from cloister_guard.config import GuardConfig
from cloister_guard.guard import Guard
from cloister_guard.identity import Caller
from tests.fakes.data import PEOPLE, people
from tests.fakes.postgres import running_postgres
from tests.fakes.running import RunningCloister, make_policy, running_cloister


def packed(key: Ed25519PrivateKey, name: str, **changes: object) -> bytes:
    """The upload of a first version of `pop-owner/NAME`, about a population of its own."""
    given: dict[str, object] = {
        "dataset": f"pop-owner/{name}",
        "population": f"pop-owner/{name}",
        "data_schema": PEOPLE,
        "data_format": "csv",
        "owner_key": public_bytes(key),
        "policy": sign_policy(make_policy(f"pop-owner/{name}", {"pop-ann": 1.0}), key),
    }
    return pack_body(Declaration.model_validate(given | changes).to_json(), people(20).to_csv(index=False).encode())


def state(key: Ed25519PrivateKey, population: str, *others: str) -> SignedStatement:
    return sign_statement(statement_about(f"pop-owner/{population}", [f"pop-owner/{each}" for each in others]), key)


class Site:
    """A running cloister, and its owner at work."""

    def __init__(self, house: RunningCloister) -> None:
        self.house = house
        house.add_user("pop-owner", "owner")
        house.add_user("pop-ann", "scientist")
        self.session = house.session("pop-owner")
        self.key = self.session.profile.owner_key(create=True)

    def send(self, name: str, statement: SignedStatement | None = None, **changes: object) -> UploadView:
        return self.post("pop-owner", packed(self.key, name, statement=statement, **changes))

    def post(self, user: str, body: bytes) -> UploadView:
        transport = self.house.session(user).transport
        return transport.call("POST", "/datasets", body, UploadView, "application/vnd.cloister.upload")

    def state(self, population: str, *others: str) -> SignedStatement:
        return state(self.key, population, *others)

    @property
    def populations(self) -> list[str]:
        views = self.session.transport.call("GET", "/datasets", None, DatasetList).datasets
        return sorted({view.population for view in views})


@pytest.fixture(scope="module")
def site() -> Iterator[Site]:
    with running_cloister() as house:
        found = Site(house)
        assert found.send("patients").version == 1  # The first one has nothing to be told apart from.
        yield found


def test_the_same_people_under_another_name_get_no_fresh_budget(site: Site) -> None:
    with pytest.raises(InvalidRequestError, match="--other-people"):
        site.send("again")
    # They are charged where they are, as another dataset of theirs.
    assert site.send("again", population="pop-owner/patients").version == 1
    accounts = site.house.session("pop-ann").transport.call("GET", "/accounts", None, AccountList).accounts
    assert {account.population for account in accounts} == {"pop-owner/patients"}
    assert site.populations == ["pop-owner/patients"]


def test_only_the_owners_whole_and_present_word_opens_another_one(site: Site) -> None:
    thief = Ed25519PrivateKey.generate()
    right = site.state("staff", "patients")
    for wrong in (
        state(thief, "staff", "patients"),
        site.state("others", "patients"),
        site.state("staff", "patients", "nobody"),
        site.state("staff", "nobody"),
        right.model_copy(update={"document": right.document.replace(b"staff", b"stafg")}),
        # The owner's key says something else.
        right.model_copy(update={"signature": sign_policy(make_policy("pop-owner/staff", {}), site.key).signature}),
        SignedStatement(document=b"{}", signature=site.key.sign(POPULATION_LABEL + b"{}")),
    ):
        with pytest.raises(PolicyRefusedError):
            site.send("staff", wrong)
    before = site.populations
    # The control: the right word does.
    assert site.send("staff", right).version == 1
    assert site.populations == sorted([*before, "pop-owner/staff"])
    # Said before there was a second population, it says nothing of that one.
    with pytest.raises(PolicyRefusedError, match="name all of yours"):
        site.send("guests", site.state("guests", "patients"))
    assert site.send("guests", site.state("guests", "patients", "staff")).version == 1


def test_a_statement_that_nothing_needs_is_refused(site: Site) -> None:
    with pytest.raises(InvalidRequestError, match="nothing to state"):
        site.send("more", site.state("more", "patients"), population="pop-owner/patients")
    with pytest.raises(InvalidRequestError, match="nothing to state"):
        site.send("patients", site.state("x", "patients"), policy=None)


def test_who_has_the_owners_password_but_not_their_key_opens_nothing(site: Site) -> None:
    """An admin makes users and can learn passwords. The admin's own role uploads nothing either."""
    theirs = Ed25519PrivateKey.generate()
    others = [name.split("/")[1] for name in site.populations]
    alone = packed(theirs, "stolen", statement=state(theirs, "stolen", *others))
    lies = packed(theirs, "stolen", statement=state(theirs, "stolen", *others), owner_key=public_bytes(site.key))
    for user, body, error in (
        ("pop-owner", alone, PolicyRefusedError),
        ("pop-owner", lies, PolicyRefusedError),
        ("admin", alone, ForbiddenError),
        ("pop-ann", alone, ForbiddenError),
    ):
        with pytest.raises(error):
            site.post(user, body)
    # The control: with the key, the same upload is good.
    assert site.send("stolen", site.state("stolen", *others)).version == 1


def test_a_policy_has_no_say_in_who_is_charged(site: Site) -> None:
    """It names no population, can't be made to, and counts for its own dataset alone."""
    name = "pop-owner/patients"

    def put(signed: SignedPolicy, dataset: str = name) -> PolicyView:
        return site.session.transport.call("PUT", f"/datasets/{dataset}/policy", signed, PolicyView)

    second = make_policy(name, {"pop-ann": 2.0}, version=2)
    document = second.canonical().replace(b'"dataset":', b'"population":"pop-owner/fresh","dataset":')
    for forged in (
        SignedPolicy(document=document, signature=site.key.sign(POLICY_LABEL + document)),
        sign_policy(make_policy("pop-owner/again", {"pop-ann": 2.0}, version=2), site.key),
    ):
        with pytest.raises(PolicyRefusedError):
            put(forged)
    assert put(sign_policy(second, site.key)).signed.policy() == second
    view = site.session.transport.call("GET", f"/datasets/{name}", None, DatasetView)
    assert (view.population, view.policy_version) == (name, 2)


def test_nobody_opens_a_population_in_another_owners_name(site: Site) -> None:
    with pytest.raises(ForbiddenError):
        site.send("z", population="somebody-else/people")
    with pytest.raises(ConflictError):
        site.send("patients", policy=None, population="pop-owner/fresh")


def test_two_at_once_open_one(site: Site) -> None:
    known = [name.split("/")[1] for name in site.populations]
    outcomes: list[object] = []

    def upload(name: str) -> None:
        try:
            outcomes.append(site.send(name, site.state(name, *known)))
        except CloisterError as error:
            outcomes.append(error)

    threads = [threading.Thread(target=upload, args=(name,)) for name in ("race-a", "race-b")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["PolicyRefusedError", "UploadView"]


class House:
    """A guard inside the test, over a database that the test can look into, and meddle with."""

    def __init__(self, guard: Guard) -> None:
        self.guard = guard
        self.key = Ed25519PrivateKey.generate()

    def send(self, name: str, *others: str, **changes: object) -> UploadView:
        statement = state(self.key, name, *others) if others else None
        body = packed(self.key, name, statement=statement, **changes)
        return self.guard.catalogue.upload(Caller("pop-owner", "owner"), body)

    def try_to(self, name: str, *others: str, **changes: object) -> str:
        """What came of an upload: "opened", or the code of its refusal."""
        try:
            self.send(name, *others, **changes)
        except CloisterError as error:
            return error.code
        return "opened"

    def leaves(self, session: Session) -> list[PopulationOpened]:
        payloads = session.scalars(select(Leaf.payload).where(Leaf.kind == "population").order_by(Leaf.index))
        facts = [LeafBody.from_json(payload).facts for payload in payloads]
        return [each for each in facts if isinstance(each, PopulationOpened)]

    @property
    def stored(self) -> tuple[object, ...]:
        """How much there is: rows of each table that an upload writes, and encrypted files."""
        tables = (Account, Dataset, DatasetVersion, Leaf, Owner, PolicyRow, Population, PopulationStatementRow)
        with self.guard.database.read() as session:
            rows = [session.scalar(select(func.count()).select_from(table)) for table in tables]
        return (*rows, len([*(self.guard.config.state_dir / "data").iterdir()]))


@pytest.fixture(scope="module")
def postgres() -> Iterator[Callable[[], str]]:
    with running_postgres() as fresh:
        yield fresh


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def house(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[House]:
    fresh: Callable[[], str] | None = request.getfixturevalue("postgres") if request.param == "postgresql" else None
    with tempfile.TemporaryDirectory(prefix="clo-run-") as runtime:
        config = GuardConfig(
            name="populations", listen="127.0.0.1:0", state_dir=tmp_path / "state", runtime_dir=Path(runtime),
            platform="simulated", database=fresh() if fresh else None,
        )  # fmt: skip
        guard = Guard(config)
        guard.recover()
        yield House(guard)
        guard.database.close()


def test_the_statement_is_kept_and_its_leaf_names_it(house: House) -> None:
    house.send("patients")
    house.send("staff", "patients")
    with house.guard.database.read() as session:
        (kept,) = session.scalars(select(PopulationStatementRow))
        signed = SignedStatement(document=kept.document, signature=kept.signature)
        statement = verify_statement(signed, session.get_one(Owner, "pop-owner").public_key)
        first, second = house.leaves(session)
    assert statement == statement_about("pop-owner/staff", ["pop-owner/patients"])
    assert (kept.population, signed.document) == ("pop-owner/staff", statement.canonical())
    assert (first.statement, second.statement) == (None, hashlib.sha256(signed.document).hexdigest())
    assert first.owner_key == second.owner_key == public_bytes(house.key).hex()


def test_a_refused_statement_leaves_nothing_behind(house: House) -> None:
    house.send("patients")
    before = house.stored
    assert house.try_to("staff") == "invalid-request"
    assert house.try_to("staff", "nobody") == "policy-refused"
    assert house.stored == before
    assert house.try_to("staff", "patients") == "opened"
    assert house.stored != before


def test_a_database_in_which_the_first_population_is_forgotten_opens_no_second_one(house: House) -> None:
    """Whoever can edit the tables takes the owner's populations away: the next one would need no statement."""
    house.send("patients")
    with house.guard.database.write() as session:
        for table in (PolicyRow, DatasetVersion, Dataset, Account, Population):
            session.execute(delete(table))
        session.execute(text("DELETE FROM account_users"))
    with pytest.raises(StorageError, match="second population needs a signed statement"):
        house.send("staff")
    with house.guard.database.read() as session:
        assert [leaf.statement for leaf in house.leaves(session)] == [None]


def test_an_owner_has_an_end_of_populations(house: House) -> None:
    house.send("patients")
    with house.guard.database.write() as session:
        like = session.get_one(Population, "pop-owner/patients")
        session.add_all(
            Population(name=f"pop-owner/p{number}", orders=like.orders, deltas=like.deltas)
            for number in range(MAX_OTHERS)
        )
    with pytest.raises(InvalidRequestError, match="one population too many"):
        house.send("staff")


@pytest.mark.postgres
@pytest.mark.parametrize("house", ["postgresql"], indirect=True)
@pytest.mark.parametrize("locked", [True, False])
def test_of_two_statements_for_the_same_list_one_opens_a_population(
    house: House, locked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both uploads are checked before either commits, as far as the owner's lock lets them. Without it, both would
    open one, each beside a population that its statement says nothing of."""
    house.send("patients")
    check, get = Catalogue._check, Session.get
    checked: list[str] = []

    def slow(self: Catalogue, session: Session, caller: Caller, declaration: Declaration) -> object:
        policy = check(self, session, caller, declaration)
        if session.connection().get_execution_options()["cloister_mode"] == "write":
            checked.append(declaration.dataset)
            wait_for_the_other()
        return policy

    def wait_for_the_other() -> None:
        """Until it was checked too, or waits for a lock."""
        waiting = text("SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with house.guard.database.read() as session:
                if len(checked) == 2 or session.scalar(waiting):
                    return
            time.sleep(0.01)
        raise AssertionError("the other upload never came")

    def lockless(self: Session, entity: Any, *arguments: Any, **options: Any) -> Any:
        if entity is Owner:
            options.pop("with_for_update", None)
        return get(self, entity, *arguments, **options)

    monkeypatch.setattr(Catalogue, "_check", slow)
    if not locked:
        monkeypatch.setattr(Session, "get", lockless)
    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(lambda name: house.try_to(name, "patients"), ("staff", "guests")))
    assert outcomes == (["opened", "policy-refused"] if locked else ["opened", "opened"])


def test_of_two_first_populations_at_once_one_is_opened(house: House) -> None:
    with ThreadPoolExecutor(2) as pool:
        outcomes = sorted(pool.map(house.try_to, ("patients", "staff")))
    assert outcomes[1] == "opened"
    assert outcomes[0] in ("conflict", "invalid-request")
    with house.guard.database.read() as session:
        assert len(house.leaves(session)) == 1


def test_of_two_first_versions_at_once_one_says_whose_data_they_are(house: House) -> None:
    house.send("patients")
    house.send("staff", "patients")
    with ThreadPoolExecutor(2) as pool:
        outcomes = pool.map(
            lambda people: (house.try_to("visits", population=f"pop-owner/{people}"), people), ("patients", "staff")
        )
        (refused, others), (opened, charged) = sorted(outcomes)
    assert (refused, opened) == ("conflict", "opened")
    # A next version goes on with the same people's accounts, and with no others'.
    with house.guard.database.read() as session:
        assert session.get_one(Dataset, "pop-owner/visits").population == f"pop-owner/{charged}"
    assert house.try_to("visits", population=f"pop-owner/{others}", policy=None) == "conflict"
    assert house.try_to("visits", population=f"pop-owner/{charged}", policy=None) == "opened"
