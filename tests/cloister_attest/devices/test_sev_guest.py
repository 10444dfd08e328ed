"""/dev/sev-guest: its structs byte by byte, room for certificates, and what its errors say."""

from __future__ import annotations

import errno

import pytest

from cloister_attest.devices.sev_guest import (
    PAUSES,
    SNP_GET_EXT_REPORT,
    SNP_GET_REPORT,
    SevGuestDevice,
    device_ioctl,
)
from cloister_attest.snp.certificate_table import VCEK_GUID, parse_table
from cloister_data.errors import ConfigurationError, UnavailableError
from tests.cloister_attest.devices.recorded import ASKED, PAGE, FakeSevGuest, certificate_table, snp_report

TABLE = certificate_table({VCEK_GUID: b"c" * 1300})


def ioctl_number(letter: str, number: int, size: int) -> int:
    """_IOWR of include/uapi/asm-generic/ioctl.h."""
    return 3 << 30 | size << 16 | ord(letter) << 8 | number


@pytest.fixture
def path(tmp_path):
    device = tmp_path / "sev-guest"
    device.write_bytes(b"")
    return device


def device(path, fake: FakeSevGuest, pauses: list[float] | None = None) -> SevGuestDevice:
    return SevGuestDevice(path, fake.ioctl, pause=([] if pauses is None else pauses).append)


def refused(path, fake: FakeSevGuest) -> str:
    with pytest.raises(UnavailableError) as caught:
        device(path, fake).extended_report(ASKED)
    assert caught.value.why
    return str(caught.value)


def test_the_requests_have_the_kernels_numbers():
    assert SNP_GET_REPORT == 0xC0205300 == ioctl_number("S", 0, 32)
    assert SNP_GET_EXT_REPORT == 0xC0205302 == ioctl_number("S", 2, 32)


def test_a_report_with_its_certificates(path):
    fake = FakeSevGuest(table=TABLE)
    report, table = device(path, fake).extended_report(ASKED)
    assert report == snp_report(ASKED)
    assert table.startswith(TABLE)
    assert parse_table(table).vcek == b"c" * 1300
    assert fake.calls == [(SNP_GET_EXT_REPORT, 2 * PAGE)]


def test_a_host_without_certificates(path):
    fake = FakeSevGuest()
    assert device(path, fake).extended_report(ASKED) == (snp_report(ASKED), b"")


def test_the_room_for_certificates_grows_once_and_stays(path):
    fake = FakeSevGuest(table=certificate_table({VCEK_GUID: b"c" * 9000}))
    machine = device(path, fake)
    for _ in range(2):
        report, table = machine.extended_report(ASKED)
        assert report == snp_report(ASKED)
        assert parse_table(table).vcek == b"c" * 9000
    assert [length for _, length in fake.calls] == [2 * PAGE, 3 * PAGE, 3 * PAGE]


def test_the_room_goes_up_to_what_the_driver_takes(path):
    fake = FakeSevGuest(table=certificate_table({VCEK_GUID: b"c" * (4 * PAGE - 48)}))
    assert len(device(path, fake).extended_report(ASKED)[1]) == 4 * PAGE


@pytest.mark.parametrize("needs", [5 * PAGE, 1 << 31, 2 * PAGE, PAGE, 3 * PAGE + 1])
def test_certificates_that_do_not_fit(path, needs):
    fake = FakeSevGuest(needs=needs)
    assert f"asks for {needs} bytes after 8192" in refused(path, fake)
    assert len(fake.calls) == 1


def test_a_host_that_asks_for_more_again(path):
    fake = FakeSevGuest(needs=3 * PAGE)
    assert "yet more room" in refused(path, fake)
    assert len(fake.calls) == 2


@pytest.mark.parametrize("fake", [FakeSevGuest(needs=0), FakeSevGuest(extended=False)], ids=["no length", "no ioctl"])
def test_a_plain_report_where_there_is_no_extended_one(path, fake):
    assert device(path, fake).extended_report(ASKED) == (snp_report(ASKED), b"")
    assert fake.calls[-1] == (SNP_GET_REPORT, 0)


@pytest.mark.parametrize(
    ("status", "says"), [(0x16, "0x16: it doesn't take the parameters"), (0x27, "signing key"), (0x99, "0x99")]
)
def test_the_firmwares_status(path, status, says):
    assert says in refused(path, FakeSevGuest(status=status))


@pytest.mark.parametrize("size", [0, 1183, 1185, 3969, 0xFFFFFFFF])
def test_a_report_of_another_length(path, size):
    assert f"{size} bytes instead of 1184" in refused(path, FakeSevGuest(size=size))


@pytest.mark.parametrize(
    ("number", "exitinfo2", "says"),
    [
        (errno.EIO, 0xFF, "fw_error 0xff, vmm_error 0x0.*didn't reach the firmware"),
        (errno.EIO, 0x16, "fw_error 0x16, vmm_error 0x0.*firmware refused"),
        (errno.EIO, 0x5_0000_0000, "fw_error 0x0, vmm_error 0x5.*host failed"),
        (errno.EIO, 0x1234_0000_0027, "fw_error 0x27, vmm_error 0x1234"),
        (errno.ETIMEDOUT, 0x2_0000_0000, "ETIMEDOUT.*vmm_error 0x2.*holds requests back"),
        (errno.EBADMSG, 0, "EBADMSG.*dmesg"),
        (errno.EINVAL, 0xFF, "EINVAL"),
    ],
)
def test_what_the_drivers_errors_mean(path, number, exitinfo2, says):
    fake = FakeSevGuest(refusals=[(number, exitinfo2)])
    with pytest.raises(UnavailableError, match=says):
        device(path, fake).extended_report(ASKED)
    assert len(fake.calls) == 1


def test_a_driver_that_gave_up_its_key(path):
    fake = FakeSevGuest(refusals=[(errno.ENOTTY, 0xFF)] * 2)
    assert "Restart the machine" in refused(path, fake)


@pytest.mark.parametrize("number", [errno.EAGAIN, errno.EBUSY, errno.EINTR])
def test_a_device_that_is_taken_for_a_moment(path, number):
    pauses: list[float] = []
    fake = FakeSevGuest(refusals=[(number, 0x2_0000_0000)] * 2)
    assert device(path, fake, pauses).extended_report(ASKED)[0] == snp_report(ASKED)
    assert pauses == list(PAUSES[:2])


def test_a_device_that_stays_taken(path):
    fake = FakeSevGuest(refusals=[(errno.EAGAIN, 0x2_0000_0000)] * 20)
    assert "holds requests back" in refused(path, fake)
    assert len(fake.calls) == len(PAUSES) + 1


def test_an_error_that_the_driver_writes_beside_success(path):
    def ioctl(descriptor: int, request: int, argument: bytearray) -> int:
        argument[24] = 0x16
        return 0

    with pytest.raises(UnavailableError, match="fw_error 0x16"):
        SevGuestDevice(path, ioctl).extended_report(ASKED)


def test_a_device_that_is_not_there(tmp_path):
    with pytest.raises(ConfigurationError, match=r"isn't there.*modprobe sev-guest"):
        SevGuestDevice(tmp_path / "absent").extended_report(ASKED)


@pytest.mark.parametrize(
    ("number", "error"), [(errno.EACCES, ConfigurationError), (errno.EBUSY, UnavailableError)], ids=["closed", "busy"]
)
def test_a_device_that_cannot_be_opened(path, monkeypatch, number, error):
    def refuse(*_: object) -> int:
        raise OSError(number, "no")

    monkeypatch.setattr("cloister_attest.devices.sev_guest.os.open", refuse)
    with pytest.raises(error, match="open"):
        SevGuestDevice(path).extended_report(ASKED)


def test_only_64_bytes_are_asked_for(path):
    with pytest.raises(ValueError, match="63 bytes where 64 belong"):
        device(path, FakeSevGuest()).extended_report(bytes(63))


def test_a_file_that_is_no_device_answers_the_real_ioctl(path):
    with pytest.raises(UnavailableError, match="ENOTTY"):
        SevGuestDevice(path, device_ioctl).extended_report(ASKED)
