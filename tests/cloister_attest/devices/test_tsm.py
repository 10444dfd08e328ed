"""Requests to configfs-TSM: their order, their conflicts, their errors, and that none is left behind."""

from __future__ import annotations

import errno
import os
import threading

import pytest

from cloister_attest.devices.tsm import MAX_BLOB, PAUSES, ConfigfsFiles, TsmReport, TsmReports
from cloister_data.errors import ConfigurationError, UnavailableError
from tests.cloister_attest.devices.recorded import ASKED, FakeConfigfs, Request, snp_report, tdx_quote

OTHER = b"o" * 64


def asked(files: FakeConfigfs, provider="sev_guest") -> tuple[TsmReport, list[float]]:
    pauses: list[float] = []
    try:
        return TsmReports(files, pause=pauses.append).report(ASKED, provider), pauses
    finally:
        assert not files.requests, "a request stayed behind"


def refused(files: FakeConfigfs, provider="sev_guest", error=UnavailableError) -> str:
    with pytest.raises(error) as caught:
        asked(files, provider)
    assert caught.value.why
    return str(caught.value)


def test_a_report_of_sev_snp_takes_these_steps():
    files = FakeConfigfs(auxblob=b"table")
    report, pauses = asked(files)
    assert (report.outblob, report.auxblob, pauses) == (snp_report(ASKED), b"table", [])
    assert files.log == [
        ("make", ""),
        ("read", "provider"),
        ("read", "generation"),
        ("read", "privlevel_floor"),
        ("write", "privlevel"),
        ("write", "inblob"),
        ("read", "generation"),
        ("read", "outblob"),
        ("read", "auxblob"),
        ("read", "generation"),
        ("remove", ""),
    ]


def test_a_quote_of_tdx_knows_neither_privilege_levels_nor_an_auxblob():
    files = FakeConfigfs("tdx_guest", tdx_quote, auxblob=b"never shown")
    report, _ = asked(files, "tdx_guest")
    assert report.auxblob == b""
    assert report.outblob
    assert [attribute for operation, attribute in files.log if operation == "write"] == ["inblob"]


def test_every_request_has_a_name_of_its_own():
    files = FakeConfigfs()
    for _ in range(3):
        asked(files)
    assert len(set(files.names)) == 3


@pytest.mark.parametrize("floor", [0, 2, 3])
def test_the_most_privileged_level_that_may_be_named_is(floor):
    report, _ = asked(FakeConfigfs(floor=floor))
    assert report.outblob == snp_report(ASKED, floor)


@pytest.mark.parametrize(
    "hidden", [{"privlevel", "privlevel_floor"}, {"privlevel_floor"}, {"privlevel"}, {"auxblob"}], ids=sorted
)
def test_attributes_that_a_kernel_does_not_have(hidden):
    report, _ = asked(FakeConfigfs(hidden=frozenset(hidden), auxblob=b"table"))
    assert report == TsmReport(snp_report(ASKED), b"" if "auxblob" in hidden else b"table")


def test_a_floor_over_the_highest_level():
    assert "privlevel_floor is 4" in refused(FakeConfigfs(floor=4))


def test_configfs_is_not_mounted():
    files = FakeConfigfs(mounted=False)
    text = refused(files, error=ConfigurationError)
    assert "isn't mounted" in text
    assert "6.7" in text
    assert files.log == [("make", "")]


def test_no_driver_has_registered():
    assert "modprobe" in refused(FakeConfigfs(None), error=ConfigurationError)


@pytest.mark.parametrize("place", [("make", ""), ("write", "inblob"), ("read", "outblob")])
def test_only_root_may(place):
    assert "root" in refused(FakeConfigfs(failures={place: [errno.EACCES]}), error=ConfigurationError)


def test_another_provider_is_refused_before_anything_is_written():
    files = FakeConfigfs("tdx_guest", tdx_quote)
    text = refused(files, error=ConfigurationError)
    assert "'tdx_guest' instead of 'sev_guest'" in text
    assert not [entry for entry in files.log if entry[0] == "write"]


def meddler(times: int, at: tuple[str, str], change):
    """Change the request before `at`, in the first `times` requests that come to it."""
    left, seen = [times], list[Request]()

    def before(operation: str, attribute: str, request: Request) -> None:
        if (operation, attribute) == at and left[0] and not any(request is known for known in seen):
            seen.append(request)
            left[0] -= 1
            change(request)

    return before


def overwrite(request: Request) -> None:
    request.inblob = OTHER
    request.write_generation += 1


@pytest.mark.parametrize("at", [("write", "inblob"), ("read", "outblob"), ("read", "auxblob")])
def test_a_request_that_somebody_else_wrote_to_is_made_anew(at):
    files = FakeConfigfs(before=meddler(2, at, overwrite))
    report, pauses = asked(files)
    assert report.outblob == snp_report(ASKED)
    assert pauses == list(PAUSES[:2])
    assert len(files.names) == 3


def test_without_the_generation_the_others_report_would_pass():
    """The control: what the kernel gives after such a write is over the other's data."""
    files = FakeConfigfs(before=meddler(1, ("read", "outblob"), overwrite))
    files.make("mine")
    files.write("mine", "inblob", ASKED)
    assert files.read("mine", "outblob", MAX_BLOB) == snp_report(OTHER)


def test_a_writer_that_never_stops():
    files = FakeConfigfs(before=meddler(99, ("read", "outblob"), overwrite))
    assert "At each of 6 attempts, another program wrote" in refused(files)
    assert len(files.names) == len(PAUSES) + 1


def test_an_inblob_that_the_kernel_silently_left_out():
    files = FakeConfigfs(drop_inblobs=1)
    report, pauses = asked(files)
    assert report.outblob == snp_report(ASKED)
    assert pauses == [PAUSES[0]]


def test_a_request_that_somebody_else_removed():
    files = FakeConfigfs()
    files.before = meddler(1, ("read", "outblob"), lambda request: files.requests.clear())
    assert asked(files)[0].outblob == snp_report(ASKED)


@pytest.mark.parametrize("number", [errno.EBUSY, errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR])
@pytest.mark.parametrize("place", [("make", ""), ("write", "privlevel"), ("write", "inblob"), ("read", "outblob")])
def test_a_device_that_is_taken_for_a_moment(number, place):
    report, pauses = asked(FakeConfigfs(failures={place: [number, number]}))
    assert report.outblob == snp_report(ASKED)
    assert pauses == list(PAUSES[:2])


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EBUSY, "EBUSY"), (errno.EWOULDBLOCK, "EAGAIN"), (errno.EINTR, "EINTR")]
)
def test_a_device_that_stays_taken(number, name):
    files = FakeConfigfs(failures={("read", "outblob"): [number] * 20})
    assert name in refused(files)
    assert len(files.failures["read", "outblob"]) == 14


def test_a_name_that_is_in_use():
    assert asked(FakeConfigfs(failures={("make", ""): [errno.EEXIST]}))[1] == [PAUSES[0]]


@pytest.mark.parametrize(
    ("number", "says"),
    [
        (errno.ETIMEDOUT, "ETIMEDOUT.*host didn't answer in time"),
        (errno.EINVAL, "EINVAL.*refused what was asked"),
        (errno.EIO, "EIO.*the host or the firmware failed"),
        (errno.ENXIO, "ENXIO.*Restart"),
        (errno.ENOTTY, "ENOTTY.*Restart"),
        (errno.EFBIG, "EFBIG.*more than 65536 bytes"),
        (errno.ENOMEM, "ENOMEM.*dmesg"),
    ],
)
@pytest.mark.parametrize("attribute", ["outblob", "auxblob"])
def test_errors_that_no_new_attempt_mends(number, says, attribute):
    files = FakeConfigfs(failures={("read", attribute): [number]})
    with pytest.raises(UnavailableError, match=f"(?i){says}"):
        asked(files)
    assert len(files.names) == 1


def test_no_request_can_be_made():
    assert "ENOMEM" in refused(FakeConfigfs(failures={("make", ""): [errno.ENOMEM]}))


def test_an_empty_report():
    assert "empty" in refused(FakeConfigfs("tdx_guest", lambda inblob, level: b""), "tdx_guest")


def test_a_report_over_the_bound():
    assert "EFBIG" in refused(FakeConfigfs(make_report=lambda inblob, level: bytes(MAX_BLOB + 1)))


@pytest.mark.parametrize("text", [b"", b"-1", b"one", b"9" * 21])
def test_a_generation_that_is_no_number(text):
    files = FakeConfigfs()
    content = files._content
    files._content = lambda request, attribute: text if attribute == "generation" else content(request, attribute)
    assert "isn't a number" in refused(files)


def test_a_request_that_cannot_be_removed_does_not_spoil_the_report():
    files = FakeConfigfs(failures={("remove", ""): [errno.EIO]})
    assert TsmReports(files).report(ASKED, "sev_guest").outblob == snp_report(ASKED)


def test_an_interrupted_program_removes_its_request():
    def interrupt(operation: str, attribute: str, request: Request) -> None:
        if attribute == "outblob":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        asked(FakeConfigfs(before=interrupt))


def test_only_64_bytes_are_asked_for():
    with pytest.raises(ValueError, match="32 bytes where 64 belong"):
        TsmReports(FakeConfigfs()).report(bytes(32), "sev_guest")


def test_the_provider_alone():
    files = FakeConfigfs("tdx_guest")
    assert TsmReports(files).provider() == "tdx_guest"
    assert not files.requests


def test_the_operations_on_real_files(tmp_path):
    files = ConfigfsFiles(tmp_path)
    files.make("one")
    attribute = tmp_path / "one" / "inblob"
    with pytest.raises(FileNotFoundError):
        files.write("one", "inblob", b"an attribute is never made")
    with pytest.raises(FileNotFoundError):
        files.read("one", "inblob", 10)
    attribute.write_bytes(b"old")
    files.write("one", "inblob", ASKED)
    assert files.read("one", "inblob", 64) == ASKED
    with pytest.raises(OSError, match="large") as caught:
        files.read("one", "inblob", 63)
    assert caught.value.errno == errno.EFBIG
    with pytest.raises(FileExistsError):
        files.make("one")
    attribute.unlink()
    files.remove("one")
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileNotFoundError):
        ConfigfsFiles(tmp_path / "absent").make("one")


def test_a_value_that_comes_in_pieces_is_read_to_its_end(tmp_path):
    files = ConfigfsFiles(tmp_path)
    files.make("one")
    os.mkfifo(tmp_path / "one" / "outblob")

    def write() -> None:
        with (tmp_path / "one" / "outblob").open("wb", buffering=0) as pipe:
            for byte in ASKED:
                pipe.write(bytes([byte]))

    writer = threading.Thread(target=write)
    writer.start()
    assert files.read("one", "outblob", MAX_BLOB) == ASKED
    writer.join()
