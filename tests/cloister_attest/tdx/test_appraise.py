"""The appraisal of a minted quote: the valid case, then one thing wrong at a time, and the very check that notices."""

from collections.abc import Callable
from dataclasses import replace

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.x509 import Certificate

from cloister_attest.tdx import abi, chain
from cloister_attest.tdx.appraise import appraise_tdx
from cloister_attest.tdx.collateral import Collateral
from cloister_attest.tdx.explain import TDX_CHECKS
from cloister_attest.tdx.policy import TdxPolicy
from tests.cloister_attest.tdx import minting as m
from tests.cloister_attest.tdx.minting import Case

NAMES = tuple(name.removeprefix("tdx-") for name in TDX_CHECKS)
TCB, MODULES, QE = m.TCB_INFO, m.TCB_INFO["tdxModuleIdentities"], m.QE_IDENTITY


def appraised(case: Case):
    checks = appraise_tdx(case.quote, case.collateral, case.policy, case.report_data, case.at)
    assert tuple(check.name for check in checks) == tuple(TDX_CHECKS)
    assert all(check.reason and check.explanation and check.source for check in checks)
    return {check.name.removeprefix("tdx-"): check for check in checks}


def failed(case: Case) -> set[str]:
    return {name for name, check in appraised(case).items() if check.verdict == "fail"}


def tcb_info(key=m.TCB_KEY, **members) -> Collateral:
    return m.collateral(tcb_info=m.document("tcbInfo", m.changed(TCB, **members), key))


def qe_identity(key=m.TCB_KEY, **members) -> Collateral:
    return m.collateral(qe_identity=m.document("enclaveIdentity", m.changed(QE, **members), key))


def pck(extension=None, **kwargs) -> Certificate:
    extension = m.sgx_extension() if extension is None else extension
    return m.certificate(
        kwargs.pop("name", chain.PCK),
        m.PCK_KEY,
        chain.PLATFORM_CA,
        kwargs.pop("key", m.CA_KEY),
        **({"authority": False, "extension": extension} | kwargs),
    )


def with_chain(*certificates: Certificate, **quote) -> Case:
    return Case(quote=m.quote(certificates=m.pem(*certificates), **quote))


def with_body(**fields: bytes) -> Case:
    return Case(quote=m.quote(body=m.td_body(**fields)))


def flags(number: int) -> bytes:
    return number.to_bytes(8, "little")


def levels(*given: dict) -> Case:
    return Case(collateral=tcb_info(tcbLevels=list(given)))


def root_crl(issuer=m.ROOT, key=m.ROOT_KEY, **kwargs) -> Case:
    return Case(collateral=m.collateral(root_crl=m.revocation_list(issuer, key, **kwargs)))


def pck_crl(issuer=m.CA, key=m.CA_KEY, **kwargs) -> Case:
    return Case(collateral=m.collateral(pck_crl=m.revocation_list(issuer, key, **kwargs)))


def authority(name=chain.PLATFORM_CA, key=m.CA_KEY, path=0, **kwargs) -> Certificate:
    return m.certificate(name, key, chain.ROOT_CA, m.ROOT_KEY, **({"authority": True, "path": path} | kwargs))


def module(**members) -> Collateral:
    return tcb_info(tdxModuleIdentities=[MODULES[0] | members])


def test_valid():
    assert {check.verdict for check in appraised(Case()).values()} == {"pass"}


@pytest.mark.parametrize(
    "quote",
    [
        m.quote(version=4, body_type=abi.BODY_TD_10),
        m.quote(version=5, body_type=abi.BODY_TD_10),
        m.quote(version=5, body_type=abi.BODY_TD_15, after=bytes(70)),
        m.quote(auth_data=b""),
        m.quote(certificates=m.pem(m.PCK, m.CA, m.ROOT) + b"\0"),
    ],
)
def test_valid_forms(quote):
    assert failed(Case(quote=quote, policy=m.strict(mr_service_td="zero-if-reported"))) == set()


EXPIRED = {"begin": m.later(-90), "end": m.later(-1)}
FUTURE = {"begin": m.later(1), "end": m.later(9)}
OTHER_ROOT = m.certificate(chain.ROOT_CA, m.OTHER_KEY, chain.ROOT_CA, m.OTHER_KEY, authority=True, path=1)
OTHER_CA = m.certificate(chain.PLATFORM_CA, m.CA_KEY, chain.ROOT_CA, m.OTHER_KEY, authority=True, path=0)
OTHER_SIGNER = m.certificate(chain.TCB_SIGNING, m.TCB_KEY, chain.ROOT_CA, m.OTHER_KEY, authority=False)


def expired_signer(piece: str) -> Case:
    signer = m.certificate(chain.TCB_SIGNING, m.TCB_KEY, chain.ROOT_CA, m.ROOT_KEY, authority=False, **EXPIRED)
    return Case(collateral=m.collateral(**{piece: m.pem(signer, m.ROOT)}))


def tail_set() -> bytes:
    """A QE report whose report data end in something other than zeros."""
    raw = m.quote()
    bound = abi.parse_quote(raw).qe_report.report_data
    return m.quote(qe_report_data=bound[:32] + b"\1" + bytes(31))


WRONG: dict[str, tuple[str, Callable[[], Case]]] = {
    "dates-leaf-expired": ("dates", lambda: with_chain(pck(**EXPIRED), m.CA, m.ROOT)),
    "dates-leaf-future": ("dates", lambda: with_chain(pck(**FUTURE), m.CA, m.ROOT)),
    "root-crl-expired": ("root-crl", lambda: root_crl(**EXPIRED)),
    "root-crl-future": ("root-crl", lambda: root_crl(**FUTURE)),
    "root-crl-forged": ("root-crl", lambda: root_crl(m.ROOT, m.OTHER_KEY)),
    "root-crl-of-the-ca": ("root-crl", lambda: root_crl(m.CA, m.CA_KEY)),
    "root-crl-junk": ("root-crl", lambda: Case(collateral=m.collateral(root_crl=b"junk"))),
    "ca-revoked": ("root-crl", lambda: root_crl(revoked=[m.CA.serial_number])),
    "signer-revoked": ("root-crl", lambda: root_crl(revoked=[m.TCB_SIGNER.serial_number])),
    "pck-crl-expired": ("pck-crl", lambda: pck_crl(**EXPIRED)),
    "pck-crl-forged": ("pck-crl", lambda: pck_crl(m.CA, m.OTHER_KEY)),
    "pck-crl-of-the-root": ("pck-crl", lambda: pck_crl(m.ROOT, m.ROOT_KEY)),
    "pck-revoked": ("pck-crl", lambda: pck_crl(revoked=[m.PCK.serial_number])),
    "qe-report-forged": ("qe-report", lambda: Case(quote=m.quote(pck_key=m.OTHER_KEY))),
    "qe-binding": ("qe-binding", lambda: Case(quote=m.quote(qe_report_data=bytes(64)))),
    "qe-binding-tail": ("qe-binding", lambda: Case(quote=tail_set())),
    "signature": ("signature", lambda: Case(quote=m.quote(signer=m.OTHER_KEY))),
    "qe-identity-forged": ("qe-identity-signature", lambda: Case(collateral=qe_identity(m.OTHER_KEY))),
    "qe-identity-expired": ("qe-identity-dates", lambda: Case(collateral=qe_identity(nextUpdate=m.stamp(m.later(-1))))),
    "qe-identity-future": ("qe-identity-dates", lambda: Case(collateral=qe_identity(issueDate=m.stamp(m.later(1))))),
    "qe-signer-expired": (
        "qe-identity-dates",
        lambda: expired_signer("qe_identity_chain"),
    ),
    "qe-miscselect": ("qe-identity", lambda: Case(quote=m.quote(qe={"miscselect": b"\1\0\0\0"}))),
    "qe-attributes-debug": ("qe-identity", lambda: Case(quote=m.quote(qe={"attributes": b"\x13"}))),
    "qe-mrsigner": ("qe-identity", lambda: Case(quote=m.quote(qe={"mrsigner": bytes(32)}))),
    "qe-isvprodid": ("qe-identity", lambda: Case(quote=m.quote(qe={"isvprodid": b"\1\0"}))),
    "qe-level": ("qe-level", lambda: Case(quote=m.quote(qe={"isvsvn": b"\1\0"}))),
    "qe-status": ("qe-status", lambda: Case(quote=m.quote(qe={"isvsvn": b"\3\0"}))),
    "tcb-info-forged": ("tcb-info-signature", lambda: Case(collateral=tcb_info(m.OTHER_KEY))),
    "tcb-info-expired": ("tcb-info-dates", lambda: Case(collateral=tcb_info(nextUpdate=m.stamp(m.later(-1))))),
    "tcb-info-future": ("tcb-info-dates", lambda: Case(collateral=tcb_info(issueDate=m.stamp(m.later(1))))),
    "tcb-signer-expired": ("tcb-info-dates", lambda: expired_signer("tcb_info_chain")),
    "tcb-info-fmspc": ("tcb-info", lambda: Case(collateral=tcb_info(fmspc="00806f050000"))),
    "tcb-info-pceid": ("tcb-info", lambda: Case(collateral=tcb_info(pceId="0001"))),
    "tcb-level-status": ("platform-status", lambda: levels(m.level(6), m.level(5, status="OutOfDate"))),
    "tcb-level-pce": ("platform-status", lambda: levels(m.level(pce=12), m.level(status="ConfigurationNeeded"))),
    "tcb-level-tdx": ("platform-status", lambda: levels(m.level(tdx=4), m.level(status="SWHardeningNeeded"))),
    "platform-revoked": (
        "platform-status",
        lambda: replace(levels(m.level(status="Revoked")), policy=m.strict(platform_tcb="any")),
    ),
    "module-status": ("module-status", lambda: with_body(tee_tcb_svn=bytes([3, 1, *[3] * 14]))),
    "report-data": ("report-data", lambda: Case(report_data=bytes(64))),
    "report-data-short": ("report-data", lambda: Case(report_data=m.REPORT_DATA[:32])),
    "debug": ("debug", lambda: with_body(tdattributes=flags(1 << 28 | 1))),
    **{
        f"profiled-{bit}": ("debug", lambda bit=bit: with_body(tdattributes=flags(1 << 28 | 1 << bit)))
        for bit in (4, 5, 6)
    },
    "sept-ve": ("sept-ve", lambda: with_body(tdattributes=flags(0))),
    "perfmon": ("perfmon", lambda: with_body(tdattributes=flags(1 << 63 | 1 << 28))),
    "td-attributes-reserved": ("td-attributes", lambda: with_body(tdattributes=flags(1 << 40 | 1 << 28))),
    "xfam-reserved": ("xfam", lambda: with_body(xfam=flags(1 << 40 | 0b11))),
    "xfam-fixed": ("xfam", lambda: replace(with_body(xfam=flags(0b10)), policy=m.strict(xfam_allowed="any"))),
    "mrservicetd": ("mrservicetd", lambda: with_body(mrservicetd=b"\1" * 48)),
    "mrservicetd-unreported": ("mrservicetd", lambda: Case(quote=m.quote(version=4, body_type=abi.BODY_TD_10))),
    "mrservicetd-migratable-unreported": (
        "mrservicetd",
        lambda: Case(
            quote=m.quote(
                version=4,
                body_type=abi.BODY_TD_10,
                body=m.td_body(abi.BODY_TD_10, tdattributes=flags(1 << 29 | 1 << 28)),
            ),
            policy=m.strict(mr_service_td="zero-if-reported"),
        ),
    ),
    "mrservicetd-named": ("mrservicetd", lambda: Case(policy=m.strict(mr_service_td=("01" * 48,)))),
    "mrtd": ("mrtd", lambda: with_body(mrtd=bytes(48))),
    **{f"rtmr{i}": (f"rtmr{i}", lambda i=i: Case(policy=m.strict(**{f"rtmr{i}": ("00" * 48,)}))) for i in range(4)},
    "mrconfigid": ("mrconfigid", lambda: with_body(mrconfigid=bytes(48))),
    "mrowner": ("mrowner", lambda: with_body(mrowner=bytes(48))),
    "mrownerconfig": ("mrownerconfig", lambda: with_body(mrownerconfig=bytes(48))),
    "tcb-evaluation": ("tcb-evaluation", lambda: Case(collateral=tcb_info(tcbEvaluationDataNumber=17))),
    "tcb-evaluation-qe": ("tcb-evaluation", lambda: Case(collateral=qe_identity(tcbEvaluationDataNumber=17))),
    "fmspc-denied": ("fmspc", lambda: Case(policy=m.strict(fmspcs_denied=(m.FMSPC.hex(),)))),
    "fmspc-not-allowed": ("fmspc", lambda: Case(policy=m.strict(fmspcs_allowed=("00" * 6,)))),
}


LEVEL = {"qe-level": "qe-status", "tcb-level": "platform-status", "module": "module-status"}
"""A status can't be judged where there is no level."""


@pytest.mark.parametrize("name", WRONG)
def test_one_thing_wrong(name):
    check, make = WRONG[name]
    assert failed(make()) == {check} | ({LEVEL[check]} if check in LEVEL else set())


@pytest.mark.parametrize(
    "make",
    [
        lambda: levels(m.level(sgx=6)),
        lambda: levels(m.level(pce=12)),
        lambda: levels(m.level(tdx=4)),
        lambda: with_chain(pck(m.sgx_extension(components=(*[5] * 15, 1))), m.CA, m.ROOT),
        lambda: with_body(tee_tcb_svn=bytes([6, 1, *[3] * 13, 2])),
    ],
)
def test_no_level_of_the_platform(make):
    assert failed(make()) == {"tcb-level", "platform-status"}


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_body(mrsignerseam=b"\1"),
        lambda: with_body(seamattributes=b"\1"),
        lambda: with_body(tee_tcb_svn=bytes([1, 1, *[3] * 14])),
        lambda: with_body(tee_tcb_svn=bytes([6, 3, *[3] * 14])),
        lambda: Case(collateral=module(mrsigner="01" * 48)),
        lambda: Case(collateral=tcb_info(tdxModuleIdentities=[])),
        lambda: Case(collateral=tcb_info(tdxModuleIdentities=[*MODULES, *MODULES])),
    ],
)
def test_no_level_of_the_module(make):
    assert failed(make()) == {"module", "module-status"}


def test_module_of_version_0_is_judged_by_the_platform():
    fine = with_body(tee_tcb_svn=bytes([3, 0, *[3] * 14]))
    low = replace(fine, collateral=tcb_info(tcbLevels=[m.level(tdx=0)]))
    checks = appraised(low)
    assert {name: check.verdict for name, check in checks.items() if check.verdict != "pass"} == {
        "module-status": "not-applicable"
    }
    # Byte 1 is the version, 0, so that a level which demands 3 there isn't reached.
    assert failed(fine) == {"tcb-level", "platform-status"}
    signer = replace(low, quote=m.quote(body=m.td_body(tee_tcb_svn=bytes([3, 0, *[3] * 14]), mrsignerseam=b"\1")))
    assert failed(signer) == {"module", "module-status"}


CHAINS: dict[str, Callable[[], tuple[Certificate, ...]]] = {
    "two": lambda: (m.PCK, m.CA),
    "four": lambda: (m.PCK, m.CA, m.ROOT, m.ROOT),
    "none": lambda: (),
    "order": lambda: (m.ROOT, m.CA, m.PCK),
    "leaf of another": lambda: (pck(key=m.OTHER_KEY), m.CA, m.ROOT),
    "ca of another": lambda: (m.PCK, OTHER_CA, m.ROOT),
    "leaf's name": lambda: (pck(name=chain.TCB_SIGNING), m.CA, m.ROOT),
    "leaf's organisation": lambda: (pck(organisation="Intel"), m.CA, m.ROOT),
    "leaf issues": lambda: (pck(authority=True), m.CA, m.ROOT),
    "leaf's hash": lambda: (pck(digest=SHA384()), m.CA, m.ROOT),
    "ca doesn't issue": lambda: (m.PCK, authority(authority=False, path=None), m.ROOT),
    "path length": lambda: (m.PCK, m.CA, authority(chain.ROOT_CA, m.ROOT_KEY)),
    "ca's name": lambda: (pck(), authority(chain.TCB_SIGNING), m.ROOT),
    "p384": lambda: (m.PCK, authority(key=ec.generate_private_key(ec.SECP384R1())), m.ROOT),
}

ON_CHAIN = {
    *("pck-chain", "root", "dates", "pck-extension", "root-crl", "pck-crl", "qe-report"),
    *("tcb-info", "tcb-level", "platform-status", "fmspc"),
}
"""What can't be checked where the PCK chain doesn't hold."""


@pytest.mark.parametrize("name", CHAINS)
def test_chain(name):
    assert failed(with_chain(*CHAINS[name]())) == ON_CHAIN


def test_format():
    for quote in (b"", m.quote()[:-1], m.quote(after=b"\1"), m.quote(version=3), m.quote(version=6), bytes(70000)):
        checks = appraised(Case(quote=quote))
        assert checks["format"].verdict == "fail"
        assert checks["signature"].verdict == "fail"
        assert checks["mrtd"].verdict == "fail"
        assert checks["qe-identity-signature"].verdict == "pass"


def test_root_is_pinned():
    assert failed(Case(policy=m.strict(roots="vendor"))) == {"root", "tcb-info-signature", "qe-identity-signature"}
    forged = with_chain(m.PCK, OTHER_CA, OTHER_ROOT)
    assert failed(forged) == {"root", "root-crl"}


def test_signing_chain_under_another_root():
    other = m.pem(OTHER_SIGNER, OTHER_ROOT)
    assert failed(Case(collateral=m.collateral(tcb_info_chain=other))) == {"tcb-info-signature", "root-crl"}
    assert failed(Case(collateral=m.collateral(qe_identity_chain=other))) == {"qe-identity-signature", "root-crl"}


def test_the_pck_does_not_sign_documents():
    by_pck = m.document("tcbInfo", TCB, m.PCK_KEY)
    chain_of_pck = m.pem(m.PCK, m.CA)
    found = failed(Case(collateral=m.collateral(tcb_info=by_pck, tcb_info_chain=chain_of_pck)))
    assert {"tcb-info-signature", "tcb-info-dates"} <= found


def test_pck_extension():
    for extension in (
        m.sgx_extension(instance=False),
        m.sgx_extension()[:-1],
        m.sgx_extension(fmspc=bytes(5)),
        m.sgx_extension(components=(5,) * 15),
        m.sgx_extension(pce_svn=1 << 16),
        b"",
        b"\x30\x00",
    ):
        found = failed(with_chain(pck(extension), m.CA, m.ROOT))
        assert found == {"pck-extension", "tcb-info", "tcb-level", "platform-status", "fmspc"}


def test_documents_of_another_kind():
    found = {"tcb-info", "module", "tcb-level", "platform-status", "module-status", "tcb-evaluation"}
    for members in ({"id": "SGX"}, {"version": 2}, {"version": True}, {"tcbLevels": []}, {"tcbType": 1}):
        assert failed(Case(collateral=tcb_info(**members))) == found
    found = {"qe-identity", "qe-level", "qe-status", "tcb-evaluation"}
    for members in ({"id": "QE"}, {"version": 1}, {"mrsigner": "00"}, {"isvprodid": "2"}, {"isvprodid": 2.0}):
        collateral = qe_identity(**members)
        assert found <= failed(Case(collateral=collateral))


FETCH = {
    "tcb_info": "/tdx/certification/v4/tcb?fmspc=90c06f000000",
    "tcb_info_chain": "/tdx/certification/v4/tcb?fmspc=90c06f000000",
    "qe_identity": "/tdx/certification/v4/qe/identity",
    "qe_identity_chain": "/tdx/certification/v4/qe/identity",
    "root_crl": "/IntelSGXRootCA.der",
    "pck_crl": "/sgx/certification/v4/pckcrl?ca=platform",
}


@pytest.mark.parametrize("piece", FETCH)
def test_missing_collateral_says_what_to_fetch(piece):
    case = Case(collateral=m.collateral(**{piece: None}))
    wrong = [check for check in appraised(case).values() if check.verdict == "fail"]
    assert {"tdx-collateral"} < {check.name for check in wrong}
    assert all(FETCH[piece] in check.reason for check in wrong)


def test_expired_collateral_says_what_to_fetch():
    checks = appraised(Case(at=int(m.later(30).timestamp())))
    wrong = {name: check.reason for name, check in checks.items() if check.verdict == "fail"}
    assert wrong.keys() == {"dates", "root-crl", "pck-crl", "qe-identity-dates", "tcb-info-dates"}
    for name in wrong.keys() - {"dates"}:
        assert FETCH[name.removesuffix("-dates").replace("-", "_")] in wrong[name]


def test_without_collateral_only_by_the_policys_word():
    nothing = Case(collateral=Collateral.none())
    assert {"collateral", "root-crl", "pck-crl", "tcb-level", "qe-status"} < failed(nothing)
    checks = appraised(replace(nothing, policy=m.strict(collateral="any")))
    assert not [name for name, check in checks.items() if check.verdict == "fail"]
    assert checks["platform-status"].verdict == "not-applicable"
    assert checks["signature"].verdict == "pass"


def test_a_document_without_its_chain_fails_under_any_policy():
    for piece, check in (("tcb_info_chain", "tcb-info-signature"), ("qe_identity_chain", "qe-identity-signature")):
        case = Case(collateral=m.collateral(**{piece: None}), policy=m.strict(collateral="any"))
        assert check in failed(case)


def test_what_is_there_is_checked_though_the_policy_does_without():
    stale = m.revocation_list(m.CA, m.CA_KEY, **EXPIRED)
    assert failed(Case(collateral=m.collateral(pck_crl=stale), policy=m.strict(collateral="any"))) == {"pck-crl"}


def test_any_is_not_applicable():
    values = {
        name: "any"
        for name in TdxPolicy.model_fields
        if name not in ("platform", "roots", "fmspcs_denied", "collateral")
    }
    checks = appraised(Case(policy=m.strict(**values)))
    waived = {name for name, check in checks.items() if check.verdict == "not-applicable"}
    assert waived == set(NAMES[NAMES.index("debug") : NAMES.index("fmspc")])
    assert {check.verdict for check in checks.values()} == {"pass", "not-applicable"}


def test_moments_that_are_none():
    assert "dates" in failed(Case(at=1 << 80))
    assert "dates" in failed(Case(at=-(1 << 80)))
