"""/dev/sev-guest: reports of AMD SEV-SNP on kernels without configfs-TSM (5.19 to 6.6).

Source: Linux, include/uapi/linux/sev-guest.h, whose terms name the fields, and drivers/virt/coco/sev-guest; AMD 56860,
MSG_REPORT_RSP; AMD 56421, SNP Extended Guest Request. Numbers are in the machine's order, little-endian on x86.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cloister_attest.snp.abi import REPORT_BYTES, REPORT_DATA_BYTES
from cloister_data.errors import ConfigurationError, UnavailableError

SEV_GUEST = Path("/dev/sev-guest")
SNP_GET_REPORT: Final = 0xC0205300
"""_IOWR('S', 0, struct snp_guest_request_ioctl)"""
SNP_GET_EXT_REPORT: Final = 0xC0205302
"""_IOWR('S', 2, struct snp_guest_request_ioctl)"""

MESSAGE_VERSION = 1
VMPL = 0
RESPONSE_BYTES = 4000
PAGE_BYTES = 4096
FIRST_TABLE = 2 * PAGE_BYTES
MAX_TABLE = 16 << 10
"""SEV_FW_BLOB_MAX_SIZE: the driver refuses a larger buffer for certificates."""

VMM_INVALID_LEN = 1
VMM_BUSY = 2
NO_FIRMWARE_CALL = 0xFF
"""fw_error as the driver sets it before it calls, and leaves it where no call got through."""
STATUS_INVALID_PARAMETERS = 0x16
STATUS_INVALID_KEY = 0x27

PAUSES = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between the attempts where the host is busy; the driver itself tries for up to 60 seconds."""

_REPORT_REQUEST = struct.Struct("=64sI28x")
"""snp_report_req: user_data, vmpl, zeros."""
_EXTENDED_REQUEST = struct.Struct("=64sI28xQI4x")
"""snp_ext_report_req: a snp_report_req, certs_address, certs_len."""
_CERTS_LEN = struct.Struct("=I")
_CERTS_LEN_AT = 104
_GUEST_REQUEST = struct.Struct("=B7xQQII")
"""snp_guest_request_ioctl: msg_version, req_data, resp_data, fw_error, vmm_error (exitinfo2's low and high half)."""
_RESPONSE = struct.Struct("<II24x")
"""MSG_REPORT_RSP: STATUS, REPORT_SIZE; the report follows."""

Ioctl = Callable[[int, int, bytearray], int]
"""(file descriptor, request, argument, which is changed in place); raises OSError."""


def device_ioctl(descriptor: int, request: int, argument: bytearray) -> int:
    # The argument is written back when the call fails too: exitinfo2 comes with the error.
    answer: int = fcntl.ioctl(descriptor, request, argument, True)
    return answer


class _Refused(Exception):
    """The ioctl failed. `certs_len` is what the extended request's field says afterwards."""

    def __init__(self, error: OSError, fw_error: int, vmm_error: int, certs_len: int = 0) -> None:
        self.errno, self.strerror = error.errno or 0, error.strerror
        self.fw_error, self.vmm_error, self.certs_len = fw_error, vmm_error, certs_len
        super().__init__(str(error))


class SevGuestDevice:
    """Asks the device. Calls must not overlap."""

    def __init__(
        self,
        path: Path = SEV_GUEST,
        ioctl: Ioctl = device_ioctl,
        *,
        pause: Callable[[float], None] = time.sleep,
    ) -> None:
        self._path, self._ioctl, self._pause = path, ioctl, pause
        self._table_bytes = FIRST_TABLE

    def extended_report(self, report_data: bytes) -> tuple[bytes, bytes]:
        """(report of 1184 bytes, the host's certificate table) over 64 bytes, at VMPL 0.

        The table is empty where the host offers none. Raises ConfigurationError or UnavailableError.
        """
        if len(report_data) != REPORT_DATA_BYTES:
            raise ValueError(f"{len(report_data)} bytes where {REPORT_DATA_BYTES} belong")
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise _unopened(self._path, error) from error
        try:
            return self._extended(descriptor, report_data)
        except _Refused as refused:
            raise _explained(refused) from refused
        finally:
            os.close(descriptor)

    def _extended(self, descriptor: int, report_data: bytes) -> tuple[bytes, bytes]:
        try:
            return self._ask_extended(descriptor, report_data)
        except _Refused as refused:
            if refused.vmm_error != VMM_INVALID_LEN:
                # The driver, or the host, doesn't know extended requests.
                if refused.errno in (errno.ENOTTY, errno.EOPNOTSUPP):
                    return self._ask_plain(descriptor, report_data), b""
                raise
            needed = refused.certs_len
        if not needed:
            return self._ask_plain(descriptor, report_data), b""
        if needed > MAX_TABLE or needed <= self._table_bytes or needed % PAGE_BYTES:
            raise UnavailableError(
                "The host's certificates don't fit into a report.",
                why=f"It asks for {needed} bytes after {self._table_bytes}, and the kernel takes whole pages, "
                f"{MAX_TABLE} bytes at most.",
                next_step="Have the host's operator shorten the certificate table, or leave it out.",
            )
        self._table_bytes = needed
        return self._ask_extended(descriptor, report_data)

    def _ask_plain(self, descriptor: int, report_data: bytes) -> bytes:
        request = ctypes.create_string_buffer(_REPORT_REQUEST.pack(report_data, VMPL), _REPORT_REQUEST.size)
        return _report(self._call(descriptor, SNP_GET_REPORT, request))

    def _ask_extended(self, descriptor: int, report_data: bytes) -> tuple[bytes, bytes]:
        table = ctypes.create_string_buffer(self._table_bytes)
        packed = _EXTENDED_REQUEST.pack(report_data, VMPL, ctypes.addressof(table), self._table_bytes)
        request = ctypes.create_string_buffer(packed, _EXTENDED_REQUEST.size)
        try:
            response = self._call(descriptor, SNP_GET_EXT_REPORT, request)
        except _Refused as refused:
            (refused.certs_len,) = _CERTS_LEN.unpack_from(request, _CERTS_LEN_AT)
            raise
        return _report(response), table.raw if any(table.raw) else b""

    def _call(self, descriptor: int, number: int, request: ctypes.Array[ctypes.c_char]) -> bytes:
        """The response. Raises _Refused."""
        for pause in (*PAUSES, None):
            response = ctypes.create_string_buffer(RESPONSE_BYTES)
            addresses = ctypes.addressof(request), ctypes.addressof(response)
            argument = bytearray(_GUEST_REQUEST.pack(MESSAGE_VERSION, *addresses, 0, 0))
            try:
                self._ioctl(descriptor, number, argument)
            except OSError as error:
                _, _, _, fw_error, vmm_error = _GUEST_REQUEST.unpack(argument)
                passing = error.errno in (errno.EAGAIN, errno.EBUSY, errno.EINTR)
                if pause is None or not passing:
                    raise _Refused(error, fw_error, vmm_error) from error
                self._pause(pause)
            else:
                # exitinfo2 is written back only where it isn't zero.
                _, _, _, fw_error, vmm_error = _GUEST_REQUEST.unpack(argument)
                if fw_error or vmm_error:
                    raise _Refused(OSError(errno.EIO, os.strerror(errno.EIO)), fw_error, vmm_error)
                return response.raw
        raise AssertionError


def _report(response: bytes) -> bytes:
    """The report in a MSG_REPORT_RSP."""
    status, size = _RESPONSE.unpack_from(response)
    if status:
        reason = {
            STATUS_INVALID_PARAMETERS: f"it doesn't take the parameters: VMPL {VMPL} isn't this machine's to name",
            STATUS_INVALID_KEY: "it doesn't have the signing key that was asked for",
        }.get(status, "this program doesn't know the code")
        raise UnavailableError("The firmware made no report.", why=f"Its status is {status:#x}: {reason}.")
    if size != REPORT_BYTES:
        raise UnavailableError(
            "The firmware made a report of another form.",
            why=f"It has {size} bytes instead of {REPORT_BYTES}.",
            next_step="A later version of Cloister may read it.",
        )
    return response[_RESPONSE.size : _RESPONSE.size + size]


def _unopened(path: Path, error: OSError) -> ConfigurationError | UnavailableError:
    why = f"{error.strerror}."
    if error.errno in (errno.ENOENT, errno.ENXIO, errno.ENODEV):
        return ConfigurationError(
            f"The device {path} isn't there.",
            why=f"{why} It isn't an SEV-SNP machine, or its kernel lacks the driver.",
            next_step="Load it (modprobe sev-guest).",
        )
    if error.errno in (errno.EACCES, errno.EPERM):
        return ConfigurationError(
            f"This program may not open {path}.", why=why, next_step="Run it as root, or give its user the device."
        )
    return UnavailableError(f"The device {path} can't be opened.", why=why, next_step="Try again.")


def _explained(refused: _Refused) -> UnavailableError:
    """What the errno and the two halves of exitinfo2 mean."""
    name = errno.errorcode.get(refused.errno, "unknown")
    why = f"{refused.strerror} ({name}); fw_error {refused.fw_error:#x}, vmm_error {refused.vmm_error:#x}."
    next_step = "Look into the kernel's log (dmesg)."
    if refused.errno == errno.ENOTTY:
        why += " After an error the driver gives up its key to the firmware."
        next_step = "Restart the machine."
    elif refused.errno == errno.ETIMEDOUT or refused.vmm_error == VMM_BUSY:
        why += " The host holds requests back."
        next_step = "Try again later."
    elif refused.vmm_error == VMM_INVALID_LEN:
        why += " The host asks for yet more room for its certificates."
        next_step = "Try again."
    elif refused.vmm_error:
        why += " The host failed at the request."
    elif refused.fw_error == NO_FIRMWARE_CALL:
        why += " The request didn't reach the firmware."
    elif refused.fw_error:
        why += " The firmware refused the request."
    return UnavailableError("The device made no report.", why=why, next_step=next_step)
