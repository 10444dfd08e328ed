"""Getting evidence from the machine this runs on. Used in the VM only."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloister_attest.measure import measure_trusted_packages
from cloister_attest.policy import AttestationPolicy
from cloister_attest.simulated.hardware import SimulatedHardware
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform

SIMULATED_ROOT_FILE = "simulated-root.pem"

_DEVICES: dict[Platform, tuple[Path, ...]] = {
    "sev-snp": (Path("/dev/sev-guest"), Path("/sys/kernel/config/tsm/report")),
    "tdx": (Path("/dev/tdx_guest"), Path("/sys/kernel/config/tsm/report")),
}


class Attester(Protocol):
    """A machine that can prove itself."""

    @property
    def platform(self) -> Platform: ...

    def collect(self, report_data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
        """(report, certificates in DER with the leaf first) over 64 bytes of report data."""
        ...

    def writers(self) -> AttestationPolicy:
        """What the machines that wrote this one's audit log must have proven: this one at earlier starts."""
        ...


def simulated_hardware(state_dir: Path) -> SimulatedHardware:
    """The simulated machine whose root is kept in `state_dir` and which runs the installed packages."""
    return SimulatedHardware.from_file(state_dir / SIMULATED_ROOT_FILE, measure_trusted_packages())


def attester_for(platform: Platform, state_dir: Path) -> Attester:
    """The attester of `platform`. Raises ConfigurationError where this machine or this version has none."""
    if platform == "simulated":
        return simulated_hardware(state_dir)
    devices = _DEVICES[platform]
    if not any(device.exists() for device in devices):
        raise ConfigurationError(
            f"This machine can't make {platform} evidence.",
            why=f"Neither {' nor '.join(map(str, devices))} is there: it isn't a confidential VM of that kind, or its "
            "kernel lacks the driver.",
            next_step='Start it as a confidential VM, or set platform = "simulated" for a trial without real data.',
        )
    raise ConfigurationError(
        f"This version of Cloister doesn't collect {platform} evidence yet.",
        why="Only simulated hardware is supported so far.",
        next_step='Set platform = "simulated" for a trial without real data.',
    )
