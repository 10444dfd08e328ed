"""What verifying a machine costs: `python -m tests.benchmarks.attestation --json`.

Verification takes real evidence where the folder of evidence is (`tests/cloister_attest/evidence.py`), and minted
evidence of the same form elsewhere. Real reports were made for others' questions, so a whole appraisal, which checks
that evidence is bound to a channel, takes minted evidence. Nothing is kept between turns.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import httpx
from cryptography.hazmat.primitives.asymmetric import ec

from cloister.session import ATTEST_PATH
from cloister_attest.appraise import appraise
from cloister_attest.binding import gpu_digest, report_data
from cloister_attest.channel import ServerIdentity, fetch_certificate, make_server_identity, pinned_context
from cloister_attest.collateral.items import Item
from cloister_attest.collateral.needs import platform_of, vcek_name
from cloister_attest.evidence import AttestRequest, Evidence
from cloister_attest.policy import AttestationPolicy, HardwarePolicy
from cloister_attest.result import Check
from cloister_attest.snp.appraise import appraise_snp
from cloister_attest.snp.certificate_table import Collateral as SnpCollateral
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.collateral import Collateral as TdxCollateral
from tests.benchmarks.figures import Figure, arguments, seconds, show, spread
from tests.cloister_attest import evidence as published
from tests.cloister_attest.snp import minted
from tests.cloister_attest.tdx import minting
from tests.fakes.attested_server import AttestedServer, FakeLog, FakeMachine

SNP_CASE, CRL_CASE, TDX_CASE = "snp/milan-v3-oak-kernel", "crl/amd-milan-empty", "tdx/v4-phala-uptodate"
BOTH_HOLD = published.moment("2025-06-01T00:00:00Z")
"""When the SNP case's certificates and the list of the other case hold."""

Appraised = Callable[[], tuple[Check, ...]]


def _case(name: str) -> published.Case | None:
    return next((case for case in published.all_cases() if published.case_id(case) == name), None)


def snp_verification() -> tuple[Appraised, str]:
    case, listed = _case(SNP_CASE), _case(CRL_CASE)
    if case is None or listed is None or BOTH_HOLD is None:
        made = minted.mint(minted.Recipe())
        policy = minted.strict_policy(made)
        return (
            lambda: appraise_snp(
                made.report, made.collateral, policy, expected_report_data=minted.REPORT_DATA, at=minted.AT
            ),
            "minted report",
        )
    report, given, _ = published.snp_parts(case)
    collateral = SnpCollateral(given.leaf, given.intermediate, given.root, published.der(listed, "crl"))
    policy, at = published.snp_policy(intermediates="known", crl="required"), BOTH_HOLD
    return (
        lambda: appraise_snp(report, collateral, policy, expected_report_data=published.UNCHECKED, at=at),
        f"real: {SNP_CASE} with {CRL_CASE}",
    )


def tdx_verification() -> tuple[Appraised, str]:
    case = _case(TDX_CASE)
    if case is None:
        made = minting.Case()
        return (
            lambda: appraise_tdx(made.quote, made.collateral, made.policy, made.report_data, made.at),
            "minted quote",
        )
    quote, collateral, at = published.tdx_parts(case)
    policy, data = published.tdx_policy(), minting.abi.parse_quote(quote).report.report_data
    return lambda: appraise_tdx(quote, collateral, policy, data, at), f"real: {TDX_CASE}"


@dataclass(frozen=True)
class Machine:
    """A minted machine: `prove` makes its report, and its certificates and collateral come with it as they are."""

    hardware: HardwarePolicy
    prove: Callable[[bytes], bytes]
    collateral: tuple[Item, ...]
    log: FakeLog
    at: int

    @property
    def policy(self) -> AttestationPolicy:
        return AttestationPolicy(
            format=2, publisher="none", gpu="forbidden", log_key="any", log_origin="any", hardware=self.hardware
        )

    def evidence(self, spki: bytes, nonce: bytes) -> Evidence:
        checkpoint = self.log.checkpoint()
        bound = report_data(spki, nonce, gpu_digest(None), checkpoint.encode(), self.log.public_key)
        return Evidence(
            platform=self.hardware.platform,
            report=self.prove(bound),
            certificates=(),
            checkpoint=checkpoint,
            log_key=self.log.public_key,
            collateral=self.collateral,
        )


def snp_machine() -> Machine:
    key, recipe = ec.generate_private_key(ec.SECP384R1()), minted.Recipe()
    made = minted.mint(recipe, key)
    product, given = recipe.product, made.collateral
    name = vcek_name(minted.HWID[product], minted.TCB[product])
    items = (
        Item(kind="amd-vcek", name=name, content=given.leaf or b"", chain=b""),
        Item(kind="amd-ask", name=product, content=given.intermediate or b"", chain=b""),
        Item(kind="amd-ark", name=product, content=given.root or b"", chain=b""),
        Item(kind="amd-crl", name=product, content=given.crl or b"", chain=b""),
    )
    return Machine(
        minted.strict_policy(made),
        lambda bound: minted.report(minted.Recipe(patch={0x50: bound}), key),
        items,
        FakeLog(),
        minted.AT,
    )


def tdx_machine() -> Machine:
    given: TdxCollateral = minting.collateral()
    ca, fmspc = platform_of(minting.quote())
    items = (
        Item(kind="intel-root-crl", name="root", content=given.root_crl or b"", chain=b""),
        Item(kind="intel-pck-crl", name=ca, content=given.pck_crl or b"", chain=b""),
        Item(kind="intel-tcb-info", name=fmspc, content=given.tcb_info or b"", chain=given.tcb_info_chain or b""),
        Item(
            kind="intel-qe-identity",
            name="td",
            content=given.qe_identity or b"",
            chain=given.qe_identity_chain or b"",
        ),
    )
    return Machine(
        minting.strict(),
        lambda bound: minting.quote(body=minting.td_body(reportdata=bound)),
        items,
        FakeLog(),
        minting.AT,
    )


def milliseconds(samples: list[float]) -> tuple[float, str]:
    """The median in ms, and its quartiles in words."""
    middle, first, third = spread(samples)
    return middle * 1e3, f"quartiles {first * 1e3:.2f}-{third * 1e3:.2f}"


def verification(turns: int) -> Iterator[Figure]:
    for name, goal, (work, what) in (
        ("snp verification", 3, snp_verification()),
        ("tdx verification with collateral", 6, tdx_verification()),
    ):
        failed = [f"{check.name}: {check.reason}" for check in work() if check.verdict == "fail"]
        if failed:
            raise SystemExit(f"{what} doesn't hold: {failed}")
        value, words = milliseconds([seconds(work) for _ in range(turns)])
        yield Figure(name, value, "ms", goal, "lower", f"{words}; median of {turns}; {what}")


def whole(turns: int) -> Iterator[Figure]:
    identity, nonce = make_server_identity(), bytes(range(32))
    for machine in (snp_machine(), tdx_machine()):
        policy, shown = machine.policy, machine.evidence(identity.spki, nonce).to_json()

        def judge(policy: AttestationPolicy = policy, shown: bytes = shown, at: int = machine.at) -> None:
            verdict = appraise(shown, policy, certificate=identity.certificate_der, nonce=nonce, at=at)
            if not verdict.ok:
                raise SystemExit(f"the evidence doesn't hold: {verdict.failed}")

        judge()
        value, words = milliseconds([seconds(judge) for _ in range(turns)])
        yield Figure(
            f"{policy.platform}: whole appraisal", value, "ms", None, "lower",
            f"{words}; median of {turns}; {len(shown)} bytes of JSON, {len(machine.collateral)} items of collateral",
        )  # fmt: skip


def _ask(url: str, context: ssl.SSLContext, nonce: bytes) -> bytes:
    """One request for evidence on a connection of its own, as a session makes it."""
    with httpx.Client(base_url=url, verify=context, trust_env=False, follow_redirects=False) as client:
        return client.post(ATTEST_PATH, content=AttestRequest(nonce=nonce).to_json()).content


def attested_connect(server: AttestedServer, policy: AttestationPolicy, at: int) -> None:
    certificate = fetch_certificate("127.0.0.1", server.port)
    request = AttestRequest.fresh()
    answer = _ask(server.url, pinned_context(certificate), request.nonce)
    verdict = appraise(answer, policy, certificate=certificate, nonce=request.nonce, at=at)
    if not verdict.ok:
        raise SystemExit(f"the evidence doesn't hold: {verdict.failed}")


def plain_connect(server: AttestedServer) -> None:
    """What any client does that knows the server's certificate: the same request, and the answer isn't looked at."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=server.identity.certificate_der)
    _ask(server.url, context, AttestRequest.fresh().nonce)


def connecting(turns: int) -> Iterator[Figure]:
    simulated, snp = FakeMachine(), snp_machine()
    machines: tuple[tuple[str, Callable[[bytes, bytes], Evidence], AttestationPolicy, int | None], ...] = (
        ("simulated", simulated.evidence, simulated.hardware.trust(), None),
        ("sev-snp", snp.evidence, snp.policy, snp.at),
    )
    for name, prove, policy, fixed in machines:
        identity: ServerIdentity = make_server_identity()
        attested: list[float] = []
        plain: list[float] = []
        with AttestedServer(
            identity=identity, answer=lambda nonce, prove=prove, spki=identity.spki: prove(spki, nonce)
        ) as server:

            def attest(
                server: AttestedServer = server, policy: AttestationPolicy = policy, fixed: int | None = fixed
            ) -> None:
                attested_connect(server, policy, int(time.time()) if fixed is None else fixed)

            def connect(server: AttestedServer = server) -> None:
                plain_connect(server)

            for work in (attest, connect) * 5:
                work()
            for _ in range(turns):
                attested.append(seconds(attest))
                plain.append(seconds(connect))
        (ours, our_words), (peer, peer_words) = milliseconds(attested), milliseconds(plain)
        ratio, first, third = spread([one / other for one, other in zip(attested, plain, strict=True)])
        yield Figure(
            f"{name}: attested connect / plain TLS connect", ratio, "x", 5, "lower",
            f"quartiles {first:.2f}-{third:.2f}; median of {turns}; {ours:.1f} ms ({our_words}) and {peer:.1f} ms "
            f"({peer_words}), alternating, over loopback",
        )  # fmt: skip


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--turns", type=int, default=100, help="how often each is timed")
    chosen = parser.parse_args()
    for part in (verification, whole, connecting):
        show(part(chosen.turns), chosen.json)


if __name__ == "__main__":
    main()
