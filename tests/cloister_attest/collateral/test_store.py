"""Collateral on disk: dates, rollback, damage, and several processes at once."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from cloister_attest.collateral.items import Item
from cloister_attest.collateral.needs import Piece
from cloister_attest.collateral.store import CollateralStore
from cloister_data.errors import ConfigurationError, StorageError
from tests.cloister_attest.collateral.pieces import TDX_AT, days, root_crl, snp, snp_items, tcb_info, tdx_items
from tests.cloister_attest.tdx import minting as intel

NOW = datetime.fromtimestamp(TDX_AT, UTC)


@pytest.fixture
def store(tmp_path: Path) -> CollateralStore:
    return CollateralStore(tmp_path / "kept" / "collateral")


def test_what_was_put_is_read_with_its_source_and_dates(store: CollateralStore) -> None:
    assert store.read_all() == store.list() == ()
    assert store.get(Piece("intel-root-crl", "root")) is None
    items = (*tdx_items(), *snp_items())
    for item in items:
        assert store.put(item, "https://example.org/x", TDX_AT) == "stored"
    assert set(store.read_all()) == set(items)
    found = {(entry.kind, entry.name): entry for entry in store.list()}[("intel-root-crl", "root")]
    assert (found.source, found.fetched) == ("https://example.org/x", TDX_AT)
    assert (found.valid_from, found.valid_until) == (intel.BEGIN, intel.END)
    assert stat.S_IMODE(store.directory.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in store.directory.iterdir()} == {0o600}


def test_only_what_the_evidence_needs_is_read(store: CollateralStore) -> None:
    for item in (*tdx_items(), *snp_items(), *snp_items("Turin")):
        store.put(item, "x", TDX_AT)
    for path in store.directory.glob("*Turin*"):
        path.write_bytes(b"damaged")
    assert set(store.relevant("tdx", intel.quote(), ())) == set(tdx_items())
    assert set(store.relevant("sev-snp", snp().report, ())) == set(snp_items())
    assert store.relevant("simulated", b"", ()) == ()
    assert store.relevant("sev-snp", b"hostile", (b"x",)) == ()
    assert {item.kind for item in store.relevant("tdx", b"hostile", ())} == {"intel-root-crl", "intel-qe-identity"}
    with pytest.raises(ConfigurationError, match="damaged"):
        store.relevant("sev-snp", snp("Turin").report, ())


def test_a_report_of_version_2_finds_its_chain_through_its_vcek(store: CollateralStore) -> None:
    items = snp_items("Milan", version=2)
    for item in items:
        store.put(item, "x", TDX_AT)
    assert set(store.relevant("sev-snp", snp("Milan", version=2).report, ())) == set(items)


def test_an_older_piece_doesn_t_replace_a_later_one(store: CollateralStore) -> None:
    later, older = root_crl(NOW - days(2), NOW + days(9)), root_crl(NOW - days(9), NOW + days(20))
    assert store.put(older, "x", TDX_AT) == "stored"
    assert store.put(later, "x", TDX_AT) == "replaced"
    assert store.put(older, "attacker", TDX_AT) == "kept"
    assert store.put(older, "attacker", TDX_AT + 10 * 86400) == "kept"
    assert store.put(root_crl().model_copy(update={"content": b"rubbish"}), "attacker", TDX_AT) == "kept"
    assert store.put(later, "again", TDX_AT + 5) == "same"
    (entry,) = store.list()
    assert (entry.valid_from, entry.source, entry.fetched) == (NOW - days(2), "again", TDX_AT + 5)


def test_an_earlier_tcb_evaluation_waits_until_the_later_one_has_expired(store: CollateralStore) -> None:
    store.put(tcb_info(NOW - days(5), NOW + days(5), 18), "x", TDX_AT)
    reissued = tcb_info(NOW - days(1), NOW + days(9), 17)
    assert store.put(reissued, "x", TDX_AT) == "kept"
    assert store.put(reissued, "x", TDX_AT + 6 * 86400) == "replaced"


def test_a_piece_from_the_future_doesn_t_block_true_ones(store: CollateralStore) -> None:
    store.put(root_crl(NOW + days(900), NOW + days(999)), "forger", TDX_AT)
    assert store.put(root_crl(NOW - days(1), NOW + days(9)), "x", TDX_AT) == "replaced"


def test_an_unreadable_piece_gives_way(store: CollateralStore) -> None:
    store.put(root_crl().model_copy(update={"content": b"rubbish"}), "x", TDX_AT)
    assert store.list()[0].valid_until is None
    assert store.put(root_crl(), "x", TDX_AT) == "repaired"


@pytest.mark.parametrize("damage", ["cut", "other", "huge", "name"])
def test_a_damaged_file_is_an_error_that_names_it_until_it_is_fetched_again(
    store: CollateralStore, damage: str
) -> None:
    store.put(root_crl(), "x", TDX_AT)
    (path,) = store.directory.glob("*.json")
    content = path.read_bytes()
    if damage == "cut":
        path.write_bytes(content[:-20])
    elif damage == "other":
        path.write_text(json.dumps(json.loads(content) | {"extra": 1}))
    elif damage == "huge":
        with path.open("ab") as file:
            file.truncate(13 << 20)
    else:
        store.put(tcb_info(), "x", TDX_AT)
        next(store.directory.glob("intel-tcb*")).replace(path)
    for read in (store.read_all, store.list, lambda: store.relevant("tdx", intel.quote(), ())):
        with pytest.raises(ConfigurationError, match=r"intel-root-crl\.root\.json.*Fetch it again"):
            read()
    assert store.put(root_crl(), "x", TDX_AT) == "repaired"
    assert store.read_all() == (root_crl(),) or damage == "name"


def test_a_directory_that_can_t_be_made_is_a_storage_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError):
        CollateralStore(tmp_path / "file" / "below").put(root_crl(), "x", TDX_AT)


WRITER = """
import sys
from pathlib import Path
from cloister_attest.collateral.items import Item
from cloister_attest.collateral.store import CollateralStore
store = CollateralStore(Path(sys.argv[1]))
items = [Item.from_json(line) for line in Path(sys.argv[2]).read_bytes().splitlines()]
if sys.argv[3] == "backwards":
    items.reverse()
for item in items:
    store.put(item, "x", int(sys.argv[4]))
    assert len(store.read_all()) == 1
"""


def test_several_processes_leave_the_newest(store: CollateralStore, tmp_path: Path) -> None:
    lists = [root_crl(NOW - days(20 - age), NOW + days(9)) for age in range(20)]
    file = tmp_path / "items"
    file.write_bytes(b"\n".join(item.to_json() for item in lists))
    arguments = [sys.executable, "-c", WRITER, str(store.directory), str(file)]
    running = [subprocess.Popen([*arguments, order, str(TDX_AT)]) for order in ("forwards", "backwards", "forwards")]
    assert [process.wait(60) for process in running] == [0, 0, 0]
    assert store.read_all() == (lists[-1],)
    assert sorted(path.name for path in store.directory.iterdir()) == ["intel-root-crl.root.json", "lock"]


def test_the_largest_item_fits_its_file(store: CollateralStore) -> None:
    largest = Item(kind="intel-root-crl", name="root", content=b"\xff" * (8 << 20), chain=b"\xff" * (32 << 10))
    store.put(largest, "s" * 3000, TDX_AT)
    assert store.read_all() == (largest,)
