"""Foreign bytes are parsed in a process that may die of them, or be taken over by them; the guard goes on."""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pyarrow as pa
import pyarrow.parquet
import pytest

from cloister_data.datasets import DatasetList, Declaration, UploadView
from cloister_data.errors import CloisterError, InvalidRequestError, TooLargeError, UnavailableError
from cloister_data.framing import pack_body
from cloister_data.owner import public_bytes, sign_policy
from cloister_data.schema import DateColumn, IntegerColumn, RealColumn, Schema, TextColumn
from cloister_guard import uploads
from cloister_guard.datasets.ingest import Format, read_rows
from cloister_guard.uploads import UploadReader
from cloister_guard.worker import process
from cloister_guard.worker.process import WorkerLimits
from cloister_guard.worker.shared import lend_bytes, lend_room, view, writable
from tests.fakes.running import RunningCloister, make_policy

SCHEMA = Schema(columns=(RealColumn(name="x", low=0, high=10), IntegerColumn(name="n", low=0, high=10)))
CSV = b"x,n\n1.5,2\n2.5,3\n"
READ_HERE = (
    "import sys, pyarrow.parquet as pq, pyarrow as pa\n"
    "file = pq.ParquetFile(pa.BufferReader(sys.stdin.buffer.read()))\n"
    "meta = file.metadata\n"
    "[meta.row_group(0).column(at).statistics for at in range(meta.num_columns)]\n"
    "list(file.iter_batches())\n"
)


def parquet(table: pa.Table | None = None) -> bytes:
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(table or pa.table({"x": [1.0, 2.0], "n": [1, 2]}), sink)
    return bytes(sink.getvalue())


def repeated(value: str, columns: int, rows: int) -> bytes:
    """A small file that is large when it is unpacked: each column holds one text, once, for all rows."""
    column = pa.DictionaryArray.from_arrays(pa.repeat(pa.scalar(0, pa.int32()), rows), [value])
    return parquet(pa.table({f"c{at}": column for at in range(columns)}))


def dies_of(blob: bytes) -> bool:
    """Whether a process of its own that reads the file is aborted."""
    ended = subprocess.run([sys.executable, "-c", READ_HERE], input=blob, capture_output=True, check=False)
    return ended.returncode == -signal.SIGABRT


@pytest.fixture(scope="module")
def deadly() -> bytes:
    """A damaged file on which the Parquet reader calls std::terminate: one byte of its metadata is another."""
    blob = bytearray(parquet())
    blob[243] = 35
    # The control: without a process of its own, the reader takes its caller with it.
    assert dies_of(bytes(blob))
    assert not dies_of(parquet())
    return bytes(blob)


@contextmanager
def nothing_left() -> Iterator[None]:
    """No process and no descriptor is there after it that wasn't there before."""

    def held() -> tuple[set[int], int]:
        return {child.pid for child in psutil.Process().children(recursive=True)}, len(os.listdir("/proc/self/fd"))

    before = held()
    yield
    assert held() == before


def test_a_file_that_kills_its_reader_is_refused_in_words(deadly: bytes) -> None:
    reader = UploadReader(WorkerLimits())
    reader(CSV, "csv", SCHEMA)
    with nothing_left(), pytest.raises(InvalidRequestError, match=r"can't be read as Parquet.*Nothing was stored"):
        reader(deadly, "parquet", SCHEMA)


def test_the_guard_outlives_a_deadly_file(deadly: bytes, shared_cloister: RunningCloister) -> None:
    shared_cloister.add_user("upl-owner", "owner")
    session = shared_cloister.session("upl-owner")
    key = session.profile.owner_key(create=True)
    declaration = Declaration(
        dataset="upl-owner/people",
        population="upl-owner/people",
        data_schema=SCHEMA,
        data_format="parquet",
        owner_key=public_bytes(key),
        policy=sign_policy(make_policy("upl-owner/people", {}), key),
    )
    before = sorted((shared_cloister.state / "data").iterdir())
    kind = "application/vnd.cloister.upload"
    with pytest.raises(InvalidRequestError, match="Nothing was stored"):
        session.transport.call("POST", "/datasets", pack_body(declaration.to_json(), deadly), UploadView, kind)
    assert shared_cloister.process.poll() is None
    assert sorted((shared_cloister.state / "data").iterdir()) == before
    left = psutil.Process(shared_cloister.process.pid).children(recursive=True)
    assert not [child for child in left if "cloister_guard.worker" in child.cmdline()]
    assert session.transport.call("GET", "/datasets", None, DatasetList).datasets == ()
    # The control: the file as it was before it was damaged is taken.
    body = pack_body(declaration.to_json(), parquet())
    assert session.transport.call("POST", "/datasets", body, UploadView, kind).rows == 2


@pytest.mark.parametrize(("blob", "data_format"), [(CSV, "csv"), (parquet(), "parquet")])
def test_what_is_read_is_the_same_as_without_a_worker(blob: bytes, data_format: Format) -> None:
    found = UploadReader(WorkerLimits())(memoryview(blob), data_format, SCHEMA)
    assert found.equals(read_rows(blob, data_format, SCHEMA))


@pytest.mark.parametrize(
    ("blob", "data_format"),
    [
        (CSV + b"99,3\n,4\n", "csv"),
        (b"", "csv"),
        (b"", "parquet"),
        (b"x\n1\n", "csv"),
        (b"x,n\n", "csv"),
        (parquet()[:-9], "parquet"),
    ],
)
def test_what_is_wrong_is_told_in_the_same_words_as_without_a_worker(blob: bytes, data_format: Format) -> None:
    with pytest.raises(CloisterError) as here:
        read_rows(blob, data_format, SCHEMA)
    with nothing_left(), pytest.raises(CloisterError) as there:
        UploadReader(WorkerLimits())(memoryview(blob), data_format, SCHEMA)
    assert there.value.to_problem() == here.value.to_problem()


def test_a_file_that_unpacks_to_more_memory_than_a_worker_has_is_refused() -> None:
    schema = Schema(columns=tuple(TextColumn(name=f"c{at}", max_bytes=4096) for at in range(2)))
    limits = WorkerLimits(memory_bytes=1 << 30)
    with nothing_left(), pytest.raises((TooLargeError, InvalidRequestError), match="more memory"):
        UploadReader(limits)(repeated("m" * 4096, 2, 200_000), "parquet", schema)
    # The control: the same file with fewer rows fits.
    assert UploadReader(limits)(repeated("m" * 4096, 2, 2_000), "parquet", schema).num_rows == 2_000


def test_a_table_larger_than_what_is_lent_for_it_is_refused_in_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(uploads, "MAX_DECODED_BYTES", 128)
    with nothing_left(), pytest.raises(TooLargeError, match="takes 256 bytes, and 128 are the most"):
        UploadReader(WorkerLimits())(CSV, "csv", SCHEMA)


def test_a_file_that_takes_too_much_processor_time_is_refused() -> None:
    """Texts that become days one by one: a small file, seconds for each of its columns."""
    schema = Schema(columns=tuple(DateColumn(name=f"c{at}", low="2020-01-01", high="2021-01-01") for at in range(20)))
    limits = WorkerLimits(cpu_seconds=3)
    with nothing_left(), pytest.raises(InvalidRequestError, match="more memory or time than it may"):
        UploadReader(limits)(repeated("2020-02-03", 20, 1_000_000), "parquet", schema)
    # The control: the same file with fewer rows is read in time.
    assert UploadReader(limits)(repeated("2020-02-03", 20, 100), "parquet", schema).num_rows == 100


TAKEN_OVER = """#!{python}
import json, mmap, os, struct, sys
upload, answer = map(int, sys.argv[-2:])
def say(report, blob=b""):
    head = json.dumps(report).encode()
    os.write(1, struct.pack(">II", 4 + len(head) + len(blob), len(head)) + head + blob)
say({{"kind": "ready"}})
os.read(0, 65536)
room = mmap.mmap(answer, 4096)
def put(x=(1.5, 2.5), n=(2, 3), valid=3):
    for at, piece in enumerate((bytes([valid]), struct.pack("2d", *x), bytes([3]), struct.pack("2q", *n))):
        room[at * 64 : at * 64 + len(piece)] = piece
{does}
os.read(0, 65536)
"""


@contextmanager
def taken_over(does: str, directory: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Workers are a program of the file's author, which isn't confined either."""
    program = directory / "python"
    program.write_text(TAKEN_OVER.format(python=sys.executable, does=does))
    program.chmod(0o700)
    with monkeypatch.context() as patched:
        patched.setattr(process.sys, "executable", str(program))
        yield


@pytest.mark.parametrize(
    ("does", "message"),
    [
        ('put(x=(1.5, 99.0)); say({"kind": "table", "rows": 2})', "'x' is outside"),
        ('put(x=(1.5, float("nan"))); say({"kind": "table", "rows": 2})', "'x' isn't a finite number"),
        ('put(valid=1); say({"kind": "table", "rows": 2})', "'x' isn't declared nullable"),
        ('put(); say({"kind": "table", "rows": 20_000_000})', "something else than the declared columns"),
        ('put(); say({"kind": "table", "rows": 1 << 40})', "can't be read"),
        ('put(); say({"kind": "table", "rows": 0})', "can't be read"),
        ('put(); say({"kind": "table", "rows": 2, "columns": ["x", "n"]})', "can't be read"),
        ('put(); say({"kind": "trained"}, b"0" * 1000)', "can't be read"),
        ('os.write(1, b"\\xff" * 4096)', "can't be read"),
        ("sys.exit(0)", "can't be read"),
        ('say({"kind": "failed"})', "can't be read"),
        (
            "say({'kind': 'refused', 'problem': {'type': 'x', 'title': 'y' * 9999, 'status': 400, 'code': 'z'}})",
            "can't be read",
        ),
        # Made smaller under the guard's eyes, the memory would end the guard when it looks: it can't be.
        ('put(); os.ftruncate(answer, 0); say({"kind": "table", "rows": 2})', "can't be read"),
        ('put(); os.ftruncate(answer, 1 << 40); say({"kind": "table", "rows": 2})', "can't be read"),
    ],
)
def test_a_worker_in_foreign_hands_can_only_be_refused(
    does: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "MAX_DECODED_BYTES", 1 << 20)
    with taken_over(does, tmp_path, monkeypatch), nothing_left(), pytest.raises(InvalidRequestError, match=message):
        UploadReader(WorkerLimits(answer_seconds=60))(CSV, "csv", SCHEMA)


def test_a_worker_that_never_answers_is_refused_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = pytest.raises(InvalidRequestError, match=r"can't be read as CSV.*more memory or time than it may")
    with taken_over("os.read(0, 65536)", tmp_path, monkeypatch), nothing_left(), refused:
        UploadReader(WorkerLimits(answer_seconds=0.5))(CSV, "csv", SCHEMA)


def test_what_it_says_within_the_schema_is_its_owners_affair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: the program above is believed where it answers as a worker does, and changes nothing afterwards."""
    late = 'put(); say({"kind": "table", "rows": 2})\nif os.read(0, 1) == b"": put(x=(9.0, 9.0))'
    with taken_over(late, tmp_path, monkeypatch):
        found = UploadReader(WorkerLimits(answer_seconds=60))(CSV, "csv", SCHEMA)
    assert found.to_pylist() == [{"x": 1.5, "n": 2}, {"x": 2.5, "n": 3}]


def test_lent_memory_holds_what_was_lent_and_keeps_its_size() -> None:
    with lend_bytes(b"an upload") as upload, lend_room(100) as room:
        assert bytes(view(upload)) == b"an upload"
        for descriptor in (upload, room):
            for size in (0, 1 << 20):
                with pytest.raises(PermissionError):
                    os.ftruncate(descriptor, size)
        with pytest.raises(PermissionError):
            os.pwrite(upload, b"x", 0)
        with pytest.raises(PermissionError):
            writable(upload, 9)
        writable(room, 3)[:] = b"abc"
        kept = view(room)
    assert bytes(kept) == b"abc" + bytes(97)
    with lend_bytes(b"") as nothing:
        assert bytes(view(nothing)) == b""


def test_a_machine_without_memory_for_an_upload_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    for name in ("memfd_create", "write", "ftruncate"):
        with monkeypatch.context() as patched, nothing_left():
            patched.setattr(os, name, full)
            with pytest.raises(UnavailableError, match="Nothing was stored"):
                UploadReader(WorkerLimits())(CSV, "csv", SCHEMA)


def test_damaged_files_give_an_error_of_ours_or_kill_their_reader_alone() -> None:
    """Some thousand files with one to four wrong bytes, in processes that may die of them."""
    found: collections.Counter[str] = collections.Counter()
    done, cases = 0, 3000
    while done < cases:
        ran = subprocess.run(
            [sys.executable, "-m", "tests.fakes.damaged", str(done), str(cases)],
            capture_output=True, text=True, check=False, cwd=Path(__file__).parents[2],
        )  # fmt: skip
        lines = ran.stdout.splitlines()
        found.update(lines)
        done += len(lines)
        if ran.returncode:
            assert ran.returncode == -signal.SIGABRT, ran.stderr
            found["died"] += 1
            done += 1
    assert set(found) <= {"read", "refused", "died"}
    assert found["read"]
    assert found["refused"]
