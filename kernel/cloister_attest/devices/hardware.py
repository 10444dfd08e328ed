"""Real machines as attesters: AMD SEV-SNP and Intel TDX. What a device gives is read before it is handed on.

The readings are no proof; they refuse evidence that no client could accept, with a reason that its operator can use.
"""

from __future__ import annotations

import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Protocol

from cloister_attest.devices.sev_guest import SEV_GUEST, SevGuestDevice
from cloister_attest.devices.tsm import ConfigfsFiles, TsmReports
from cloister_attest.evidence import MAX_CERTIFICATE
from cloister_attest.outcome import EvidenceError
from cloister_attest.policy import AttestationPolicy
from cloister_attest.snp import abi as snp
from cloister_attest.snp.certificate_table import parse_table
from cloister_attest.tdx import abi as tdx
from cloister_data.errors import ConfigurationError, UnavailableError
from cloister_data.policy import Platform

REPORT_DATA_BYTES = 64
TURN_SECONDS = 90.0
"""How long a caller waits for the one before it. Drivers give up on a host after 60 seconds (SNP) or 30 (TDX)."""

_PEM = b"-----BEGIN CERTIFICATE-----"


class SnpSource(Protocol):
    """Where SNP reports come from."""

    def extended_report(self, report_data: bytes) -> tuple[bytes, bytes]:
        """(report, certificate table, empty where the host offers none) over 64 bytes."""
        ...


class SnpThroughTsm:
    """SNP reports by way of configfs-TSM."""

    def __init__(self, reports: TsmReports) -> None:
        self._reports = reports

    def extended_report(self, report_data: bytes) -> tuple[bytes, bytes]:
        report = self._reports.report(report_data, "sev_guest")
        return report.outblob, report.auxblob


def find_snp_source(reports: TsmReports, device: Path = SEV_GUEST) -> SnpSource:
    """configfs-TSM where it serves SNP, else the device. Raises ConfigurationError where neither does."""
    try:
        provider = reports.provider()
    except ConfigurationError:
        if device.exists():
            return SevGuestDevice(device)
        raise
    if provider == "sev_guest":
        return SnpThroughTsm(reports)
    if device.exists():
        return SevGuestDevice(device)
    raise ConfigurationError(
        "This machine can't make sev-snp evidence.",
        why=f"configfs-TSM names the provider {provider[:64]!r}, and {device} isn't there.",
        next_step="Set the platform that this machine has.",
    )


def check_tdx_source(reports: TsmReports) -> TsmReports:
    """`reports`, once they are known to be TDX quotes. Raises ConfigurationError that says what is needed."""
    try:
        provider = reports.provider()
    except ConfigurationError as error:
        raise ConfigurationError(
            "This machine can't make tdx evidence.",
            why=f"{error.what} {error.why} /dev/tdx_guest alone gives TDREPORTs, which only this very processor can "
            "verify.",
            next_step="It needs a kernel with configfs-TSM (6.7 or later), and a quote generation service on its host.",
        ) from error
    if provider != "tdx_guest":
        raise ConfigurationError(
            "This machine can't make tdx evidence.",
            why=f"configfs-TSM names the provider {provider[:64]!r} instead of 'tdx_guest'.",
            next_step="Set the platform that this machine has.",
        )
    return reports


class SnpHardware:
    """An AMD SEV-SNP machine, as an Attester. Safe to call from several threads, which take turns."""

    platform: Final[Platform] = "sev-snp"

    def __init__(self, source: SnpSource, writers: AttestationPolicy) -> None:
        """`writers` is what the machines that wrote this one's audit log must have proven."""
        self._source, self._writers, self._turn = source, writers, threading.Lock()

    def collect(self, report_data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
        """(report of 1184 bytes, certificates in DER) over 64 bytes.

        The certificates are (VCEK or VLEK, ASK or ASVK, ARK), as far as the host supplies them without a gap.
        Raises ConfigurationError or UnavailableError.
        """
        _check_length(report_data)
        with _in_turn(self._turn):
            report, table = self._source.extended_report(report_data)
        try:
            parsed = snp.parse(report)
        except EvidenceError as error:
            raise _unusable("report", f"{error}") from error
        if parsed.report_data != report_data:
            raise _unusable("report", "it was made over other report data than was asked for")
        try:
            collateral = parse_table(table).collateral(parsed.signing_key)
        except EvidenceError as error:
            raise _unusable("table of certificates", f"{error}", "Have the host's operator load it again.") from error
        certificates: list[bytes] = []
        for certificate in (collateral.leaf, collateral.intermediate, collateral.root):
            if certificate is None:
                break
            certificates.append(_der(certificate))
        return report, tuple(certificates)

    def writers(self) -> AttestationPolicy:
        return self._writers


class TdxHardware:
    """An Intel TDX machine, as an Attester. Safe to call from several threads, which take turns."""

    platform: Final[Platform] = "tdx"

    def __init__(self, reports: TsmReports, writers: AttestationPolicy) -> None:
        """`writers` is what the machines that wrote this one's audit log must have proven."""
        self._reports, self._writers, self._turn = reports, writers, threading.Lock()

    def collect(self, report_data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
        """(quote, without what pads it, no certificates) over 64 bytes: the quote carries its own chain.

        Raises ConfigurationError or UnavailableError.
        """
        _check_length(report_data)
        with _in_turn(self._turn):
            raw = self._reports.report(report_data, "tdx_guest").outblob
        try:
            parsed = tdx.parse_quote(raw)
        except EvidenceError as error:
            raise _unusable("quote", f"{error}") from error
        if parsed.report.report_data != report_data:
            raise _unusable("quote", "it was made over other report data than was asked for")
        length_at = len(parsed.signed)
        length = int.from_bytes(raw[length_at : length_at + 4], "little")
        return raw[: length_at + 4 + length], ()

    def writers(self) -> AttestationPolicy:
        return self._writers


def hardware_of_this_machine(platform: Platform, writers: AttestationPolicy) -> SnpHardware | TdxHardware:
    """The attester for this machine's devices. Raises ConfigurationError where they don't serve `platform`."""
    reports = TsmReports(ConfigfsFiles())
    if platform == "sev-snp":
        return SnpHardware(find_snp_source(reports), writers)
    if platform == "tdx":
        return TdxHardware(check_tdx_source(reports), writers)
    raise ValueError(f"{platform} isn't real hardware")


@contextmanager
def _in_turn(turn: threading.Lock) -> Iterator[None]:
    if not turn.acquire(timeout=TURN_SECONDS):
        raise UnavailableError(
            "The device that makes this machine's evidence is taken.",
            why=f"An earlier request hasn't ended within {TURN_SECONDS:.0f} seconds.",
            next_step="Try again later.",
        )
    try:
        yield
    finally:
        turn.release()


def _check_length(report_data: bytes) -> None:
    if len(report_data) != REPORT_DATA_BYTES:
        raise ValueError(f"{len(report_data)} bytes where {REPORT_DATA_BYTES} belong")


def _der(certificate: bytes) -> bytes:
    """The certificate in DER; hosts load PEM into their tables too."""
    if certificate.lstrip().startswith(_PEM):
        # The decoder would read over the seam between two.
        if certificate.count(_PEM) > 1:
            raise _unusable("table of certificates", "it holds several certificates in one place")
        try:
            certificate = ssl.PEM_cert_to_DER_cert(certificate.rstrip(b"\0").decode("ascii"))
        except ValueError as error:
            raise _unusable("table of certificates", "it holds PEM that can't be read") from error
    if len(certificate) > MAX_CERTIFICATE:
        raise _unusable("table of certificates", f"one of them has more than {MAX_CERTIFICATE} bytes")
    return certificate


def _unusable(thing: str, why: str, next_step: str = "Look into the kernel's log (dmesg).") -> UnavailableError:
    return UnavailableError(f"The device gave a {thing} that can't be used.", why=f"{why}.", next_step=next_step)
