"""Nobody is in two parts: not in one upload after another, not in other files about the same people, not in a race."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister_guard.catalogue
from cloister_budget.clock import steady_time
from cloister_budget.database import Database, open_database
from cloister_budget.journal import Journal
from cloister_budget.ledger import Ledger
from cloister_budget.log import AuditLog
from cloister_budget.tables import Dataset, DatasetVersion, Population
from cloister_data.datasets import DatasetView, Declaration, SplitRef
from cloister_data.errors import CloisterError, ConflictError, InvalidRequestError, StorageError
from cloister_data.framing import pack_body
from cloister_data.owner import public_bytes, sign_policy
from cloister_data.schema import BooleanColumn, DateColumn, Schema, TextColumn
from cloister_guard.catalogue import Catalogue
from cloister_guard.datasets.ingest import read_upload
from cloister_guard.datasets.split import PART_COLUMN, select_part, unit_text
from cloister_guard.datasets.store import DatasetStore
from cloister_guard.identity import Caller
from cloister_guard.leases import Leases
from cloister_guard.owners import Owners
from cloister_guard.partition import _unit_texts, anybody_moved
from cloister_guard.uploads import UploadReader
from cloister_guard.worker.process import WorkerLimits
from tests.fakes.audited import believe
from tests.fakes.postgres import running_postgres
from tests.fakes.running import make_policy
from tests.fakes.sites import SITES, patients, sited
from tests.fakes.stored import file_keys

OWNER = Caller("clinic", "owner")
RECORDS, SCANS = "clinic/records", "clinic/scans"


class Desk:
    """A catalogue on a database and a store of its own, and the owner who publishes there."""

    def __init__(self, directory: Path, url: str) -> None:
        self.database: Database = open_database(url)
        self.store = DatasetStore(directory / "data", file_keys(directory / "key"))
        journal = Journal(AuditLog(Ed25519PrivateKey.generate(), "clinic.example/log", steady_time), believe)
        self.catalogue = Catalogue(
            self.database,
            Ledger(steady_time),
            journal,
            Owners(self.database, journal, Leases(30)),
            self.store,
            UploadReader(WorkerLimits()),
            simulated=True,
        )
        self.key = Ed25519PrivateKey.generate()

    def send(self, rows: pd.DataFrame, name: str = RECORDS, schema: Schema | None = None, first: bool = False) -> int:
        """Upload a version about the people of the records; its number."""
        declaration = Declaration(
            dataset=name,
            population=RECORDS,
            data_schema=schema or sited(),
            data_format="csv",
            owner_key=public_bytes(self.key),
            policy=sign_policy(make_policy(name, {"ann": 1.0}), self.key) if first else None,
        )
        body = pack_body(declaration.to_json(), rows.to_csv(index=False).encode())
        return self.catalogue.upload(OWNER, body).version

    def view(self, name: str = RECORDS) -> DatasetView:
        return self.catalogue.show(OWNER, name)

    @property
    def files(self) -> int:
        return len(list((self.store._directory).iterdir()))


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def desk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Desk]:
    if request.param == "sqlite":
        found = Desk(tmp_path, f"sqlite:///{tmp_path / 'guard.db'}")
    else:
        postgres: Callable[[], str] = request.getfixturevalue("postgres")
        found = Desk(tmp_path, postgres())
    found.send(patients(north=6, south=3, east=1), first=True)
    yield found
    found.database.close()


@pytest.fixture(scope="module")
def postgres() -> Iterator[Callable[[], str]]:
    with running_postgres() as fresh:
        yield fresh


def moved(rows: pd.DataFrame, person: int, site: str) -> pd.DataFrame:
    changed = rows.copy()
    changed.loc[changed.person == person, "site"] = site
    return changed


def test_the_first_dataset_fixes_the_parts(desk: Desk) -> None:
    assert desk.view().part_units == {"north": 6, "south": 3, "east": 1}
    with desk.database.read() as session:
        assert session.get_one(Population, RECORDS).parts == SITES
    # Another order, another column and other people are no other parts.
    renamed = sited(("east", "north", "south"), column="place", partition="place")
    assert desk.send(patients(50, north=2, east=3).rename(columns={"site": "place"}), SCANS, renamed, first=True) == 1
    assert desk.view(SCANS).part_units == {"east": 3, "north": 2, "south": 0}


def test_somebody_who_moved_is_refused_and_nothing_is_stored(desk: Desk) -> None:
    rows, files = patients(north=6, south=3, east=1), desk.files
    for version in (moved(rows, 0, "south"), moved(rows, 9, "north"), moved(rows.iloc[::-1], 4, "east").head(8)):
        with pytest.raises(ConflictError, match="another part") as caught:
            desk.send(version)
        for word in (*SITES, "20", "50"):
            assert word not in str(caught.value)
    assert (desk.view().version, desk.files) == (1, files)
    # The control: the same rows, in any order, with some gone and others new.
    assert desk.send(rows.iloc[::-1].iloc[2:]) == 2
    assert desk.send(pd.concat([rows, patients(100, north=2)])) == 3


def test_all_earlier_files_about_these_people_count(desk: Desk) -> None:
    rows = patients(north=6, south=3, east=1)
    assert desk.send(patients(20, north=2), SCANS, first=True) == 1
    assert desk.send(rows.head(3)) == 2
    # In a version that was replaced; in another dataset; both for a dataset that is new itself.
    with pytest.raises(ConflictError, match="records, version 1"):
        desk.send(moved(rows, 9, "south"))
    with pytest.raises(ConflictError, match="scans, version 1"):
        desk.send(moved(patients(20, north=2), 21, "east"))
    with pytest.raises(ConflictError, match="records, version 1"):
        desk.send(moved(rows, 9, "south"), "clinic/letters", first=True)
    assert desk.send(rows) == 3


def test_a_partition_neither_goes_nor_comes_nor_changes(desk: Desk) -> None:
    rows = patients(north=2)
    for schema, name in (
        (sited(partition=None), RECORDS),
        (sited(partition=None), SCANS),
        (sited((*SITES, "west")), RECORDS),
        (sited(SITES[:2]), SCANS),
    ):
        with pytest.raises(ConflictError, match="divided into north, south, east"):
            desk.send(rows, name, schema, first=name == SCANS)
    with desk.database.write() as session:
        session.get_one(Population, RECORDS).parts = ()
    with pytest.raises(ConflictError, match="into no parts"):
        desk.send(rows)


def test_a_version_that_the_database_lost_lets_nothing_in(desk: Desk) -> None:
    desk.send(patients(north=6))
    with desk.database.write() as session:
        session.delete(session.get_one(DatasetVersion, (RECORDS, 1)))
    with pytest.raises(StorageError):
        desk.send(patients(north=6))
    assert desk.view().version == 2


def test_an_earlier_file_that_cannot_be_read_lets_nothing_in(desk: Desk) -> None:
    with desk.database.read() as session:
        file = session.get_one(DatasetVersion, (RECORDS, 1)).file
    (desk.store._directory / file).write_bytes(b"altered")
    with pytest.raises(StorageError):
        desk.send(patients(north=6))


def two_at_once(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two uploads that put somebody new into different parts; each is checked before either is published."""
    both, check = threading.Barrier(2), cloister_guard.catalogue.check_nobody_moved

    def wait(*arguments: object) -> None:
        check(*arguments)  # type: ignore[arg-type]
        both.wait(timeout=60)

    monkeypatch.setattr(cloister_guard.catalogue, "check_nobody_moved", wait)
    outcomes: list[str] = []

    def upload(name: str, site: str) -> None:
        try:
            desk.send(patients(77, **{site: 1}), name, first=name != RECORDS)
            outcomes.append("published")
        except CloisterError as error:
            outcomes.append(f"{type(error).__name__}: {error.what}")

    threads = [threading.Thread(target=upload, args=each) for each in ((RECORDS, "north"), (SCANS, "south"))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sorted(outcomes)


def test_two_uploads_at_once_put_nobody_into_two_parts(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    refused, published = two_at_once(desk, monkeypatch)
    assert published == "published"
    assert "meanwhile" in refused


def test_without_the_second_look_they_do(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    """The positive control of the race."""
    monkeypatch.setattr(cloister_guard.catalogue, "_files", lambda versions: [])
    assert two_at_once(desk, monkeypatch) == ["published", "published"]
    with desk.database.read() as session:
        assert session.query(Dataset).count() == 2


def table(schema: Schema, text: str) -> object:
    return read_upload(text.encode(), "csv", schema, split_key=b"k" * 32)


BY_TEXT = Schema(
    privacy_unit="who",
    partition="abroad",
    columns=(TextColumn(name="who", max_bytes=40), BooleanColumn(name="abroad")),
)
BY_DAY = Schema(
    privacy_unit="who",
    partition="abroad",
    columns=(DateColumn(name="who", low="0001-01-01", high="2030-01-01"), BooleanColumn(name="abroad")),
)


def test_people_are_known_by_one_text_whatever_column_names_them() -> None:
    number = sited(("false", "true"))
    numbers = table(number, "person,site,age\n7,true,1\n8,false,1\n")
    texts = table(BY_TEXT, "who,abroad\n7,true\n008,true\nx,false\n")
    assert not anybody_moved(numbers, number, texts, BY_TEXT)
    assert anybody_moved(numbers, number, table(BY_TEXT, "who,abroad\n8,true\n"), BY_TEXT)
    days = table(BY_DAY, "who,abroad\n2024-01-31,true\n0001-01-01,false\n")
    assert anybody_moved(days, BY_DAY, table(BY_TEXT, "who,abroad\n0001-01-01,true\n"), BY_TEXT)
    for found, schema in ((numbers, number), (texts, BY_TEXT), (days, BY_DAY)):
        column = found.column(str(schema.privacy_unit)).to_pylist()  # type: ignore[attr-defined]
        assert _unit_texts(found, schema).to_pylist() == [unit_text(unit) for unit in column]


def test_the_rows_of_a_part_are_its_own_on_both_sides_of_a_split() -> None:
    whole = read_upload(patients().to_csv(index=False).encode(), "csv", sited(), split_key=b"k" * 32)
    seen: list[int] = []
    for site in SITES:
        for side in ("train", "test"):
            ref = SplitRef.model_validate({"dataset": RECORDS, "division": site, "part": side, "test": 0.3})
            rows = select_part(whole, ref, SITES)
            assert set(rows.column("site").to_pylist()) == {site}
            assert rows.column_names == ["person", "site", "age"]
            seen += rows.column("person").to_pylist()
    assert sorted(seen) == list(range(1000))
    assert whole.column(PART_COLUMN).to_pylist()[:3] == [0, 0, 0]
    with pytest.raises(InvalidRequestError, match="no part"):
        select_part(whole, SplitRef(dataset=RECORDS, division="west"), SITES)


def test_the_store_counts_a_part_without_the_rows(tmp_path: Path) -> None:
    desk = Desk(tmp_path, f"sqlite:///{tmp_path / 'guard.db'}")
    desk.send(patients(), first=True)
    with desk.database.read() as session:
        version = session.get_one(DatasetVersion, (RECORDS, 1))
        assert version.part_units == (600, 300, 100)
    stored = desk.store.read_columns(version, ("person", "site", "age", "__split__", PART_COLUMN))
    (desk.store._directory / version.file).unlink()
    for site, units in {"north": 600, "south": 300, "east": 100}.items():
        counted = 0
        for side in ("train", "test"):
            ref = SplitRef.model_validate({"dataset": RECORDS, "division": site, "part": side, "test": 0.3})
            assert desk.store.public_units(version, ref) == select_part(stored, ref, SITES).num_rows
            counted += desk.store.public_units(version, ref)
        assert counted == units == desk.store.public_units(version, SplitRef(dataset=RECORDS, division=site))
    with pytest.raises(InvalidRequestError, match="no part"):
        desk.store.public_units(version, SplitRef(dataset=RECORDS, division="west"))
    desk.catalogue.discard_orphans()
    assert {path.name.partition(".")[2] for path in desk.store._directory.iterdir()} == {"split", "part", "key"}
    desk.database.close()
