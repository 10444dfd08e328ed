"""Getting evidence from the machine this runs on. Used in the VM only."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from cloister_attest.devices.hardware import hardware_of_this_machine
from cloister_attest.devices.sev_guest import SEV_GUEST
from cloister_attest.devices.tsm import TSM_ROOT
from cloister_attest.measure import measure_trusted_packages
from cloister_attest.policy import AttestationPolicy
from cloister_attest.simulated.hardware import SimulatedHardware
from cloister_data.errors import ConfigurationError
from cloister_data.policy import Platform

SIMULATED_ROOT_FILE = "simulated-root.pem"

_DEVICES: dict[Platform, tuple[Path, ...]] = {
    "sev-snp": (SEV_GUEST, TSM_ROOT),
    "tdx": (Path("/dev/tdx_guest"), TSM_ROOT),
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


def attester_for(platform: Platform, state_dir: Path, writers: AttestationPolicy | None) -> Attester:
    """The attester of `platform`. Raises ConfigurationError where this machine has none.

    `writers` is what real machines that wrote this one's audit log must have proven; simulated ones say it themselves.
    """
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
    if writers is None:
        raise ConfigurationError(
            f"Nothing says what a {platform} machine must have proven to write this audit log.",
            why="Earlier starts of the guard are believed only where their evidence holds against a trust file.",
            next_step="The configuration must name a trust file: trust = ...",
        )
    return hardware_of_this_machine(platform, writers)
