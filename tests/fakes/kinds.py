"""Machines of every kind of hardware, right or right but for one thing, and the trust file that admits a right one."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from typing import Any, ClassVar

import pytest

from cloister_attest.collateral.items import Item
from cloister_attest.policy import AttestationPolicy
from tests.cloister_attest.snp import minted
from tests.cloister_attest.snp.minted import POLICY_BITS, mint
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import FakeLog, FakeMachine, FakeRoot
from tests.fakes.real_machines import DAY, SnpMachine, TdxMachine, trust


class Simulated:
    """Attributes:
    wrong: what a machine of this kind may have wrong, and the checks that fail then, in their order.
    """

    wrong: ClassVar = {"root": "root", "measurement": "measurement", "debug": "debug", "tcb": "tcb", "chip": "chip"}

    def __init__(self) -> None:
        self._root = FakeRoot()

    def machine(self, wrong: str | None = None, log: FakeLog | None = None) -> FakeMachine:
        """A machine that the trust file admits, or one with a single thing wrong."""
        changes: dict[str, dict[str, Any]] = {
            "measurement": {"measurement": bytes(48)},
            "debug": {"debug": True},
            "tcb": {"tcb": 0},
            "chip": {"chip_id": bytes(64)},
        }
        root = FakeRoot() if wrong == "root" else self._root
        chip = root.chip(**{"chip_id": bytes([7]) * 64, **changes.get(wrong or "", {})})
        return FakeMachine(chip, log or FakeLog())

    def trust(self) -> AttestationPolicy:
        return self.machine().hardware.trust()


class SevSnp:
    """A throw-away AMD. Attributes as `Simulated`'s."""

    wrong: ClassVar = {
        "root": "snp-root",
        "measurement": "snp-measurement",
        "debug": "snp-debug",
        "tcb": "snp-minimum-tcb snp-launch-tcb",
        "chip": "snp-chip-admitted",
    }

    def __init__(self) -> None:
        self._good = SnpMachine()

    def machine(self, wrong: str | None = None, log: FakeLog | None = None) -> FakeMachine:
        good, recipe = self._good, self._good.recipe
        old = minted.TCB[recipe.product][:-1] + b"\x01"
        made: dict[str, Callable[[], SnpMachine]] = {
            # The patch makes its key another one, and `now` keeps what the genuine root signed out of the cache.
            "root": lambda: replace(good, recipe=replace(recipe, now=recipe.now - DAY)),
            "measurement": lambda: replace(good, measurement=bytes(48)),
            "debug": lambda: _patched(good, {0x08: (POLICY_BITS | 1 << 19).to_bytes(8, "little")}),
            "tcb": lambda: _patched(good, dict.fromkeys((0x38, 0x180, 0x1E0, 0x1F0), old), leaf_tcb=old),
            "chip": lambda: _patched(good, {0x1A0: b"d" * 64}, hwid=b"d" * 64),
        }
        machine = made[wrong]() if wrong else good
        with pytest.MonkeyPatch.context() as patch:
            if wrong == "root":
                patch.setattr(minted, "root_key", minted.issuer_key)
            # Made here, once: its certificates don't depend on the question.
            held = mint(machine.recipe, machine.leaf_key).collateral
        machine = replace(machine, held=held)
        assert held.crl is not None
        listed = Item(kind="amd-crl", name=recipe.product, content=held.crl, chain=b"")
        return FakeMachine(machine.attester(self.trust()), log or FakeLog(), collateral=(listed,))

    def trust(self) -> AttestationPolicy:
        return trust(self._good.hardware())


class Tdx:
    """A throw-away Intel. Attributes as `Simulated`'s. A quote names no chip."""

    wrong: ClassVar = {
        "root": "tdx-root tdx-qe-identity-signature tdx-tcb-info-signature",
        "measurement": "tdx-mrtd",
        "debug": "tdx-debug",
        "tcb": "tdx-module-status",
    }

    def __init__(self) -> None:
        self._good = TdxMachine()

    def machine(self, wrong: str | None = None, log: FakeLog | None = None) -> FakeMachine:
        bodies = {
            "measurement": {"mrtd": bytes(48)},
            "debug": {"tdattributes": (1 << 28 | 1).to_bytes(8, "little")},
            "tcb": {"tee_tcb_svn": bytes([2, 1, *[3] * 14])},
        }
        with pytest.MonkeyPatch.context() as patch:
            if wrong == "root":
                patch.setattr(minting, "ROOT_KEY", minting.OTHER_KEY)
            machine = TdxMachine() if wrong == "root" else copy(self._good)
        machine.body = bodies.get(wrong or "", {})
        return FakeMachine(machine.attester(self.trust()), log or FakeLog(), collateral=machine.items)

    def trust(self) -> AttestationPolicy:
        return trust(self._good.hardware())


Kind = Simulated | SevSnp | Tdx
KINDS: dict[str, type[Simulated] | type[SevSnp] | type[Tdx]] = {"simulated": Simulated, "sev-snp": SevSnp, "tdx": Tdx}


def _patched(good: SnpMachine, patch: dict[int, bytes], **changes: Any) -> SnpMachine:
    return replace(good, recipe=replace(good.recipe, patch=patch, **changes))
