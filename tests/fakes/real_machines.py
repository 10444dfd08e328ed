"""A guard on minted hardware: real verifiers, real attesters and a real store; only the maker's keys are throw-away."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

import cloister_guard.guard
from cloister_attest.collateral.items import Item
from cloister_attest.collateral.store import CollateralStore
from cloister_attest.collect import Attester
from cloister_attest.devices.hardware import SnpHardware, TdxHardware
from cloister_attest.devices.tsm import TsmReports
from cloister_attest.policy import AttestationPolicy, HardwarePolicy
from cloister_attest.snp.certificate_table import ARK_GUID, ASK_GUID, VCEK_GUID, Collateral
from cloister_attest.tdx import chain
from cloister_attest.tdx.policy import TdxPolicy
from cloister_data.identity import NewUser
from cloister_guard.config import Bootstrap, GuardConfig
from cloister_guard.guard import Guard
from cloister_guard.http.servers import laptop_server, listen_tcp
from cloister_guard.identity import hash_password
from tests.cloister_attest.devices.recorded import FakeConfigfs, certificate_table
from tests.cloister_attest.snp import minted
from tests.cloister_attest.snp.minted import Recipe, mint, strict_policy
from tests.cloister_attest.tdx import minting
from tests.fakes.running import ADMIN_PASSWORD, RunningCloister

NOW = datetime.now(UTC).replace(microsecond=0)
DAY = timedelta(days=1)


@dataclass
class SnpMachine:
    """A chip whose keys are here. `measurement` is of the image that it runs; `with_table`: the host has the chain.

    `held` are its certificates, where they were made already.
    """

    measurement: bytes = minted.MEASUREMENT
    with_table: bool = True
    recipe: Recipe = field(default_factory=lambda: Recipe(now=NOW))
    leaf_key: ec.EllipticCurvePrivateKey = field(default_factory=lambda: ec.generate_private_key(ec.SECP384R1()))
    held: Collateral | None = None

    def extended_report(self, report_data: bytes) -> tuple[bytes, bytes]:
        recipe = replace(self.recipe, patch=self.recipe.patch | {0x50: report_data, 0x90: self.measurement}, crl=False)
        report = minted.report(recipe, self.leaf_key)
        held = self.held or mint(recipe, self.leaf_key).collateral
        assert held.leaf is not None
        assert held.intermediate is not None
        assert held.root is not None
        table = {VCEK_GUID: held.leaf, ASK_GUID: held.intermediate, ARK_GUID: held.root}
        return report, certificate_table(table) if self.with_table else b""

    def attester(self, writers: AttestationPolicy) -> Attester:
        return SnpHardware(self, writers)

    def hardware(self, **changes: Any) -> HardwarePolicy:
        return strict_policy(mint(self.recipe, self.leaf_key), **changes)

    def publish(self, directory: Path, **changes: Any) -> None:
        """Put what AMD would publish into the store."""
        crl = mint(replace(self.recipe, **changes), self.leaf_key).collateral.crl
        assert crl is not None
        keep(directory, Item(kind="amd-crl", name=self.recipe.product, content=crl, chain=b""))


class TdxMachine:
    """A TD on a throw-away Intel of today. `body` is what its quotes say but for the question."""

    def __init__(self, body: Mapping[str, bytes] = MappingProxyType({})) -> None:
        self.body = body
        dates = {"begin": NOW - 9 * DAY, "end": NOW + 9 * DAY}
        self.root = minting.certificate(
            chain.ROOT_CA, minting.ROOT_KEY, chain.ROOT_CA, minting.ROOT_KEY, authority=True, path=1, **dates
        )
        ca = minting.certificate(
            chain.PLATFORM_CA, minting.CA_KEY, chain.ROOT_CA, minting.ROOT_KEY, authority=True, path=0, **dates
        )
        pck = minting.certificate(
            chain.PCK, minting.PCK_KEY, chain.PLATFORM_CA, minting.CA_KEY, authority=False,
            extension=minting.sgx_extension(), **dates,
        )  # fmt: skip
        signer = minting.certificate(
            chain.TCB_SIGNING, minting.TCB_KEY, chain.ROOT_CA, minting.ROOT_KEY, authority=False, **dates
        )
        said = {"issueDate": minting.stamp(NOW - 9 * DAY), "nextUpdate": minting.stamp(NOW + 9 * DAY)}
        info = minting.document("tcbInfo", minting.changed(minting.TCB_INFO, **said))
        identity = minting.document("enclaveIdentity", minting.changed(minting.QE_IDENTITY, **said))
        signers = minting.pem(signer, self.root)
        self.chain = minting.pem(pck, ca, self.root)
        self.items = (
            Item(kind="intel-tcb-info", name=minting.FMSPC.hex(), content=info, chain=signers),
            Item(kind="intel-qe-identity", name="td", content=identity, chain=signers),
            Item(
                kind="intel-root-crl", name="root", chain=b"",
                content=minting.revocation_list(self.root, minting.ROOT_KEY, **dates),
            ),
            Item(
                kind="intel-pck-crl", name="platform", chain=b"",
                content=minting.revocation_list(ca, minting.CA_KEY, **dates),
            ),
        )  # fmt: skip

    def attester(self, writers: AttestationPolicy) -> Attester:
        def report(report_data: bytes, level: int) -> bytes:
            return minting.quote(body=minting.td_body(**self.body, reportdata=report_data), certificates=self.chain)

        return TdxHardware(TsmReports(FakeConfigfs("tdx_guest", report)), writers)

    def hardware(self, **changes: Any) -> TdxPolicy:
        root = hashlib.sha256(self.root.public_bytes(Encoding.DER)).hexdigest()
        return minting.strict(roots=(root,), **changes)

    def publish(self, directory: Path) -> None:
        for item in self.items:
            keep(directory, item)


def keep(directory: Path, item: Item) -> None:
    CollateralStore(directory).put(item, "minted", int(time.time()))


def trust(hardware: HardwarePolicy, **changes: Any) -> AttestationPolicy:
    given: dict[str, Any] = {
        "format": 2, "publisher": "none", "gpu": "forbidden", "log_key": "any", "log_origin": "any",
        "hardware": hardware,
    }  # fmt: skip
    return AttestationPolicy(**(given | changes))


@dataclass
class Site:
    """A directory of a cloister on `machine`, in which guards start one after the other."""

    base: Path
    runtime: Path
    machine: SnpMachine | TdxMachine
    patch: pytest.MonkeyPatch

    def __post_init__(self) -> None:
        self.write_trust(trust(self.machine.hardware()))

        def found(platform: str, state_dir: Path, writers: AttestationPolicy | None) -> Attester:
            assert writers is not None
            return self.machine.attester(writers)

        self.patch.setattr(cloister_guard.guard, "attester_for", found)
        self.patch.setenv("CLOISTER_HOME", str(self.base / "laptop"))

    @property
    def collateral(self) -> Path:
        return self.base / "collateral"

    @property
    def values(self) -> Path:
        return self.base / "reference-values.json"

    @property
    def writers(self) -> Path:
        return self.base / "writers.toml"

    def write_trust(self, policy: AttestationPolicy) -> None:
        self.writers.write_text(policy.to_toml())

    def guard(self) -> Guard:
        """A guard that hasn't started yet."""
        platform = "tdx" if isinstance(self.machine, TdxMachine) else "sev-snp"
        config = GuardConfig(
            name="real", listen="127.0.0.1:0", state_dir=self.base / "state", runtime_dir=self.runtime,
            platform=platform, trust=self.writers, collateral_dir=self.collateral,
            reference_values=self.values if self.values.exists() else None,
            bootstrap=Bootstrap(admin="admin", password_hash=admin_hash()), max_queries=1, max_jobs=1,
        )  # fmt: skip
        return Guard(config)

    @contextlib.contextmanager
    def started(self) -> Iterator[Guard]:
        guard = self.guard()
        try:
            guard.recover()
            yield guard
        finally:
            guard.database.close()

    @contextlib.contextmanager
    def serving(self) -> Iterator[tuple[Guard, RunningCloister]]:
        """A started guard behind HTTPS on loopback, in a thread of this process."""
        with self.started() as guard, contextlib.closing(listen_tcp("127.0.0.1", 0)) as listener:
            server = laptop_server(guard, guard.evidence.identity)

            async def serve() -> None:
                watching = asyncio.create_task(guard.watch())
                try:
                    await server.serve(sockets=[listener])
                finally:
                    watching.cancel()
                    await guard.stop()

            thread = threading.Thread(target=asyncio.run, args=(serve(),))
            url = f"https://127.0.0.1:{listener.getsockname()[1]}"
            found = RunningCloister(self.base, self.runtime, None, url, self.writers)  # type: ignore[arg-type]
            thread.start()
            try:
                yield guard, found
            finally:
                found.sign_out()
                server.should_exit = True
                thread.join(30)
                assert not thread.is_alive()


@contextlib.contextmanager
def site(base: Path, machine: SnpMachine | TdxMachine, patch: pytest.MonkeyPatch) -> Iterator[Site]:
    with tempfile.TemporaryDirectory(prefix="clo-run-") as runtime:
        yield Site(base, Path(runtime), machine, patch)


@cache
def admin_hash() -> str:
    return hash_password(ADMIN_PASSWORD)


def add_owner(guard: Guard, name: str) -> None:
    guard.identity.create(NewUser(user=name, role="owner", password="long enough"))
