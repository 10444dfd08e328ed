"""configfs-TSM: the kernel's way, since 6.7, to a report or quote of whatever kind of confidential VM this is.

A directory made below /sys/kernel/config/tsm/report is a request of its own: the kernel fills it with attributes, makes
the report over `inblob` when `outblob` is first read, and counts in `generation` the writes that it took.

Source: Linux, Documentation/ABI/testing/configfs-tsm; the order and the errors are those of drivers/virt/coco.
"""

from __future__ import annotations

import errno
import os
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NoReturn, Protocol, TypeVar

from cloister_data.errors import CloisterError, ConfigurationError, UnavailableError

TSM_ROOT = Path("/sys/kernel/config/tsm/report")
INBLOB_BYTES = 64
MAX_BLOB = 64 << 10
"""Bytes read of a blob before it is refused; Linux gives at most 32 KiB."""
MAX_TEXT = 4096
"""configfs's own bound of an attribute that is text."""
MAX_PRIVLEVEL = 3
PAUSES = (0.2, 0.4, 0.8, 1.6, 3.2)
"""Seconds between the attempts. A host may take some seconds over a quote, and refuses others meanwhile."""

Provider = Literal["sev_guest", "tdx_guest"]

_PASSING = frozenset([errno.EBUSY, errno.EAGAIN, errno.EWOULDBLOCK, errno.EINTR])
_FORBIDDEN = frozenset([errno.EACCES, errno.EPERM, errno.EROFS])
_GONE = frozenset([errno.ENXIO, errno.ENOTTY, errno.ENODEV])
_T = TypeVar("_T")


class ReportFiles(Protocol):
    """The file operations on the directory of requests. All of them raise OSError."""

    def make(self, entry: str) -> None:
        """Make the directory `entry`, which the kernel fills with attributes."""
        ...

    def write(self, entry: str, attribute: str, data: bytes) -> None:
        """Give an attribute its whole value, in one write of a file that is closed when this returns."""
        ...

    def read(self, entry: str, attribute: str, limit: int) -> bytes:
        """The attribute to its end. Raises OSError (EFBIG) where it has more than `limit` bytes."""
        ...

    def remove(self, entry: str) -> None: ...


class ConfigfsFiles:
    """The operations on the real directory."""

    def __init__(self, root: Path = TSM_ROOT) -> None:
        self._root = root

    def make(self, entry: str) -> None:
        os.mkdir(self._root / entry)

    def write(self, entry: str, attribute: str, data: bytes) -> None:
        descriptor = os.open(self._root / entry / attribute, os.O_WRONLY | os.O_CLOEXEC)
        try:
            written = os.write(descriptor, data)
        finally:
            # Of a binary attribute the kernel takes the value now, and nobody hears whether it did: see `generation`.
            os.close(descriptor)
        if written != len(data):
            raise OSError(errno.EIO, f"only {written} of {len(data)} bytes were taken")

    def read(self, entry: str, attribute: str, limit: int) -> bytes:
        descriptor = os.open(self._root / entry / attribute, os.O_RDONLY | os.O_CLOEXEC)
        try:
            content = bytearray()
            while chunk := os.read(descriptor, limit + 1 - len(content)):
                content += chunk
                if len(content) > limit:
                    raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))
        finally:
            os.close(descriptor)
        return bytes(content)

    def remove(self, entry: str) -> None:
        os.rmdir(self._root / entry)


@dataclass(frozen=True)
class TsmReport:
    """`outblob` is the report or quote; `auxblob` is what the provider adds, empty where it adds nothing."""

    outblob: bytes
    auxblob: bytes


class _Conflict(Exception):
    """The device is taken, or somebody else had a hand in the request: a new one may succeed."""


class TsmReports:
    """Asks configfs-TSM. Every attempt is a request of its own, removed again whatever came of it.

    `pause` waits between attempts, in seconds.
    """

    def __init__(self, files: ReportFiles, *, pause: Callable[[float], None] = time.sleep) -> None:
        self._files, self._pause = files, pause

    def provider(self) -> str:
        """The kind of machine, in the kernel's word. Raises ConfigurationError or UnavailableError."""
        return self._repeated(lambda entry: self._text(entry, "provider"))

    def report(self, inblob: bytes, provider: Provider) -> TsmReport:
        """The report over `inblob` (64 bytes) by `provider` and no other.

        Raises ConfigurationError where this machine can't make it, and UnavailableError where it can't now.
        """
        if len(inblob) != INBLOB_BYTES:
            raise ValueError(f"{len(inblob)} bytes where {INBLOB_BYTES} belong")
        return self._repeated(lambda entry: self._ask(entry, inblob, provider))

    def _repeated(self, request: Callable[[str], _T]) -> _T:
        for pause in (*PAUSES, None):
            try:
                return self._once(request)
            except _Conflict as conflict:
                if pause is None:
                    raise UnavailableError(
                        "The device that makes this machine's evidence is taken.",
                        why=f"At each of {len(PAUSES) + 1} attempts, {conflict}.",
                        next_step="Try again; see that no other program uses configfs-TSM all the time.",
                    ) from conflict
                self._pause(pause)
        raise AssertionError

    def _once(self, request: Callable[[str], _T]) -> _T:
        entry = f"cloister-{os.getpid()}-{secrets.token_hex(8)}"
        try:
            self._files.make(entry)
        except OSError as error:
            if error.errno in _PASSING or isinstance(error, FileExistsError):
                raise _Conflict(f"the request couldn't be made: {_reason(error)[:-1]}") from error
            raise _absent(error) from error
        try:
            return request(entry)
        finally:
            # A request that stays behind costs a few kilobytes; the outcome that stands matters more.
            with suppress(OSError):
                self._files.remove(entry)

    def _ask(self, entry: str, inblob: bytes, provider: Provider) -> TsmReport:
        found = self._text(entry, "provider")
        if found != provider:
            raise ConfigurationError(
                "This machine is another kind of confidential VM than its configuration says.",
                why=f"configfs-TSM names the provider {found[:64]!r} instead of {provider!r}.",
                next_step="Set the platform that this machine has.",
            )
        before = self._generation(entry)
        snp = provider == "sev_guest"
        writes = self._choose_privilege(entry) if snp else 0
        self._write(entry, "inblob", inblob)
        # Nobody hears whether the kernel took an inblob; its generation tells.
        expected = before + writes + 1
        self._expect(entry, expected)
        outblob = self._read(entry, "outblob", MAX_BLOB)
        auxblob = self._optional(entry, "auxblob", MAX_BLOB) if snp else None
        # A write of somebody else in between has made these blobs over other data.
        self._expect(entry, expected)
        if not outblob:
            raise UnavailableError(
                "The device made an empty report.",
                why="The host's service that makes quotes failed, and older kernels don't say so.",
                next_step="Look into the host's log of that service.",
            )
        return TsmReport(outblob, auxblob or b"")

    def _choose_privilege(self, entry: str) -> int:
        """Ask for the most privileged level that this machine may name, 0 but under a paravisor. The writes made."""
        floor = self._optional(entry, "privlevel_floor", MAX_TEXT)
        level = 0 if floor is None else _number(floor, "privlevel_floor")
        if level > MAX_PRIVLEVEL:
            raise UnavailableError("The device can't be asked for a report.", why=f"Its privlevel_floor is {level}.")
        try:
            self._files.write(entry, "privlevel", b"%d\n" % level)
        except FileNotFoundError:
            return 0
        except OSError as error:
            _fail(error, "privlevel")
        return 1

    def _expect(self, entry: str, generation: int) -> None:
        found = self._generation(entry)
        if found != generation:
            raise _Conflict(f"another program wrote to the request, whose generation is {found}, not {generation}")

    def _generation(self, entry: str) -> int:
        return _number(self._read(entry, "generation", MAX_TEXT), "generation")

    def _text(self, entry: str, attribute: str) -> str:
        return self._read(entry, attribute, MAX_TEXT).decode("ascii", "replace").strip()

    def _read(self, entry: str, attribute: str, limit: int) -> bytes:
        try:
            return self._files.read(entry, attribute, limit)
        except OSError as error:
            _fail(error, attribute)

    def _optional(self, entry: str, attribute: str, limit: int) -> bytes | None:
        try:
            return self._files.read(entry, attribute, limit)
        except FileNotFoundError:
            return None
        except OSError as error:
            _fail(error, attribute)

    def _write(self, entry: str, attribute: str, data: bytes) -> None:
        try:
            self._files.write(entry, attribute, data)
        except OSError as error:
            _fail(error, attribute)


def _number(text: bytes, attribute: str) -> int:
    digits = text.strip()
    if not digits.isdigit() or len(digits) > 20:
        raise UnavailableError("The device can't be asked for a report.", why=f"Its {attribute} isn't a number.")
    return int(digits)


def _absent(error: OSError) -> CloisterError:
    """Why no request could be made."""
    if error.errno == errno.ENOENT:
        return ConfigurationError(
            "This machine's kernel offers no configfs-TSM.",
            why=f"{TSM_ROOT} isn't there: configfs isn't mounted, or the kernel is older than 6.7 or lacks the driver.",
            next_step="Mount it (mount -t configfs none /sys/kernel/config), or start a kernel with configfs-TSM.",
        )
    if error.errno in _GONE:
        return ConfigurationError(
            "This machine's kernel has no driver that makes evidence.",
            why="configfs-TSM is there, and no driver has registered with it: this isn't a confidential VM, or the "
            "driver isn't loaded.",
            next_step="Load it (modprobe sev-guest, or modprobe tdx-guest).",
        )
    if error.errno in _FORBIDDEN:
        return _forbidden(error)
    return UnavailableError("No request can be made in configfs-TSM.", why=_reason(error))


def _fail(error: OSError, attribute: str) -> NoReturn:
    """What an error of an attribute means."""
    if error.errno in _PASSING:
        raise _Conflict(f"{attribute} answered {_reason(error)[:-1]}") from error
    if error.errno == errno.ENOENT:
        raise _Conflict("another program removed the request") from error
    if error.errno in _FORBIDDEN:
        raise _forbidden(error) from error
    why, next_step = f"{attribute}: {_reason(error)}", "Look into the kernel's log (dmesg)."
    if error.errno == errno.ETIMEDOUT:
        why += " The host didn't answer in time."
        next_step = "See that the host's service that makes quotes runs, then try again."
    elif error.errno in _GONE:
        why += " The driver has gone, or after an error it gave up its key to the firmware."
        next_step = "Restart the machine."
    elif error.errno == errno.EINVAL:
        why += " The driver or the firmware refused what was asked."
    elif error.errno == errno.EFBIG:
        why += f" There are more than {MAX_BLOB} bytes."
    elif error.errno == errno.EIO:
        why += " The host or the firmware failed at it, or the host's certificates don't fit."
    raise UnavailableError("The device made no report.", why=why, next_step=next_step) from error


def _forbidden(error: OSError) -> ConfigurationError:
    return ConfigurationError(
        "This program may not use configfs-TSM.",
        why=_reason(error),
        next_step="Run it as root, which alone may.",
    )


def _reason(error: OSError) -> str:
    name = errno.errorcode.get(error.errno or 0, "unknown")
    return f"{error.strerror or 'no reason given'} ({name})."
