"""Devices that answer as Linux's drivers do: configfs-TSM in memory, and /dev/sev-guest behind its ioctl."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from uuid import UUID

from tests.cloister_attest.snp.minted import Minted, Recipe, mint
from tests.cloister_attest.tdx import minting

ASKED = bytes(range(64, 128))
PAGE = 4096


def oserror(number: int) -> OSError:
    """OSError picks the subclass by itself: FileNotFoundError for ENOENT."""
    return OSError(number, os.strerror(number))


def certificate_table(entries: dict[UUID, bytes]) -> bytes:
    """AMD 56421's layout: GUID, offset and length of each, an entry of zeros, then the certificates."""
    header, body = b"", b""
    start = 24 * (len(entries) + 1)
    for guid, content in entries.items():
        offset = start + len(body)
        header += guid.bytes + offset.to_bytes(4, "little") + len(content).to_bytes(4, "little")
        body += content
    return header + bytes(24) + body


@cache
def snp_machine() -> Minted:
    return mint(Recipe(crl=False))


def snp_report(report_data: bytes, level: int = 0) -> bytes:
    """The minted machine's report over other data: its signature doesn't hold."""
    report = bytearray(snp_machine().report)
    report[0x30:0x34] = level.to_bytes(4, "little")
    report[0x50:0x90] = report_data
    return bytes(report)


def tdx_quote(report_data: bytes, level: int = 0) -> bytes:
    return minting.quote(body=minting.td_body(reportdata=report_data))


@dataclass
class Request:
    """A directory of configfs-TSM (struct tsm_report_state)."""

    inblob: bytes = b""
    privlevel: int = 0
    write_generation: int = 0
    read_generation: int = 0
    outblob: bytes | None = None
    auxblob: bytes = b""


@dataclass
class FakeConfigfs:
    """`make_report` is given inblob and privlevel. `failures` are raised, one at each, by (operation, attribute).

    `before` runs ahead of each operation, given the request that it is about.
    """

    provider: str | None = "sev_guest"
    make_report: Callable[[bytes, int], bytes] = snp_report
    auxblob: bytes = b""
    mounted: bool = True
    floor: int = 0
    hidden: frozenset[str] = frozenset()
    failures: dict[tuple[str, str], list[int]] = field(default_factory=dict)
    before: Callable[[str, str, Request], None] = lambda operation, attribute, request: None
    drop_inblobs: int = 0
    requests: dict[str, Request] = field(default_factory=dict)
    log: list[tuple[str, str]] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    seconds: float = 0.0
    at_once: int = 0
    most_at_once: int = 0

    def make(self, entry: str) -> None:
        self.log.append(("make", ""))
        if not self.mounted:
            raise oserror(errno.ENOENT)
        self._fail("make", "")
        if self.provider is None:
            raise oserror(errno.ENXIO)
        if entry in self.requests:
            raise oserror(errno.EEXIST)
        self.names.append(entry)
        self.requests[entry] = Request()

    def write(self, entry: str, attribute: str, data: bytes) -> None:
        request = self._reach("write", entry, attribute)
        if attribute not in ("inblob", "privlevel"):
            raise oserror(errno.EACCES)
        if attribute == "privlevel":
            value = int(data)
            if not self.floor <= value <= 3:
                raise oserror(errno.EINVAL)
            request.privlevel = value
        else:
            if len(data) > 64:
                raise oserror(errno.EFBIG)
            if self.drop_inblobs:
                # The value is taken at close, whose errors go nowhere.
                self.drop_inblobs -= 1
                return
            request.inblob = data
        request.write_generation += 1

    def read(self, entry: str, attribute: str, limit: int) -> bytes:
        request = self._reach("read", entry, attribute)
        content = self._content(request, attribute)
        if len(content) > limit:
            raise oserror(errno.EFBIG)
        return content

    def remove(self, entry: str) -> None:
        self.log.append(("remove", ""))
        self._fail("remove", "")
        if self.requests.pop(entry, None) is None:
            raise oserror(errno.ENOENT)

    def _content(self, request: Request, attribute: str) -> bytes:
        if attribute == "provider":
            return f"{self.provider}\n".encode()
        if attribute == "generation":
            return f"{request.write_generation}\n".encode()
        if attribute == "privlevel_floor":
            return f"{self.floor}\n".encode()
        if attribute not in ("outblob", "auxblob"):
            raise oserror(errno.EACCES)
        if not request.inblob:
            raise oserror(errno.EINVAL)
        if request.outblob is None or request.read_generation != request.write_generation:
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            time.sleep(self.seconds)
            self.at_once -= 1
            request.outblob = self.make_report(request.inblob, request.privlevel)
            request.auxblob = self.auxblob
            request.read_generation = request.write_generation
        return request.outblob if attribute == "outblob" else request.auxblob

    def _reach(self, operation: str, entry: str, attribute: str) -> Request:
        self.log.append((operation, attribute))
        if entry in self.requests:
            self.before(operation, attribute, self.requests[entry])
        snp_only = attribute in ("privlevel", "privlevel_floor", "auxblob") and self.provider != "sev_guest"
        if entry not in self.requests or snp_only or attribute in self.hidden:
            raise oserror(errno.ENOENT)
        self._fail(operation, attribute)
        return self.requests[entry]

    def _fail(self, operation: str, attribute: str) -> None:
        queue = self.failures.get((operation, attribute))
        if queue:
            raise oserror(queue.pop(0))


@dataclass
class FakeSevGuest:
    """The driver's ioctl. It reads and writes the caller's structs at the addresses that they name.

    `refusals` are (errno, exitinfo2), one for each of the next calls. `status` and `size` go into MSG_REPORT_RSP.
    """

    make_report: Callable[[bytes, int], bytes] = snp_report
    table: bytes = b""
    needs: int | None = None
    extended: bool = True
    status: int = 0
    size: int | None = None
    refusals: list[tuple[int, int]] = field(default_factory=list)
    calls: list[tuple[int, int]] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def ioctl(self, descriptor: int, request: int, argument: bytearray) -> int:
        assert os.fstat(descriptor)
        assert self.busy.acquire(blocking=False), "two calls at once"
        try:
            return self._answer(request, argument)
        finally:
            self.busy.release()

    def _answer(self, request: int, argument: bytearray) -> int:
        assert request in (0xC0205300, 0xC0205302)
        assert len(argument) == request >> 16 & 0x3FFF == 32
        # msg_version, and the padding before the addresses.
        assert argument[:8] == b"\x01" + bytes(7)
        req_data, resp_data = (int.from_bytes(argument[at : at + 8], "little") for at in (8, 16))
        extended = request == 0xC0205302
        asked = ctypes.string_at(req_data, 112 if extended else 96)
        user_data, vmpl = asked[:64], int.from_bytes(asked[64:68], "little")
        assert asked[68:96] == bytes(28)
        certs_address = certs_len = 0
        if extended:
            certs_address = int.from_bytes(asked[96:104], "little")
            certs_len = int.from_bytes(asked[104:108], "little")
            assert asked[108:112] == bytes(4)
        self.calls.append((request, certs_len))
        if self.refusals:
            number, exitinfo2 = self.refusals.pop(0)
            self._refuse(argument, number, exitinfo2)
        if extended and not self.extended:
            self._refuse(argument, errno.ENOTTY, 0xFF)
        if certs_len > 0x4000 or certs_len % PAGE:
            self._refuse(argument, errno.EINVAL, 0xFF)
        needed = -(-len(self.table) // PAGE) * PAGE if self.needs is None else self.needs
        if extended and (needed > certs_len or self.needs is not None):
            ctypes.memmove(req_data + 104, needed.to_bytes(4, "little"), 4)
            self._refuse(argument, errno.EIO, 1 << 32)
        if extended:
            ctypes.memmove(certs_address, self.table.ljust(certs_len, b"\0"), certs_len)
        report = self.make_report(user_data, vmpl)
        size = len(report) if self.size is None else self.size
        response = self.status.to_bytes(4, "little") + size.to_bytes(4, "little") + bytes(24) + report
        ctypes.memmove(resp_data, response.ljust(4000, b"\0"), 4000)
        # exitinfo2 is zero, and so it isn't written back.
        return 0

    @staticmethod
    def _refuse(argument: bytearray, number: int, exitinfo2: int) -> None:
        argument[24:32] = exitinfo2.to_bytes(8, "little")
        raise oserror(number)
