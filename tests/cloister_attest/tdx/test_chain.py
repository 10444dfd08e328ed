"""Certificates and lists, one rule at a time: the valid form passes, and the one that breaks the rule is told why."""

from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx import chain
from tests.cloister_attest.tdx import minting as m

UNKNOWN = x509.UnrecognizedExtension(x509.ObjectIdentifier("2.25.1"), b"\x05\x00")


def pck(key=m.PCK_KEY, extension=None, **kwargs) -> x509.Certificate:
    extension = m.sgx_extension() if extension is None else extension
    return m.certificate(chain.PCK, key, chain.PLATFORM_CA, m.CA_KEY, authority=False, extension=extension, **kwargs)


def refused(pem: bytes, reason: str) -> None:
    with pytest.raises(EvidenceError, match=reason):
        chain.verify_pck_chain(pem)


def test_valid_chain():
    held = chain.verify_pck_chain(m.pem(m.PCK, m.CA, m.ROOT).replace(b"\n", b"\r\n"))
    assert held.certificates == (m.PCK, m.CA, m.ROOT)
    assert held.ca_name == chain.PLATFORM_CA


def test_processor_ca_names_no_platform_instance():
    ca = m.certificate(chain.PROCESSOR_CA, m.CA_KEY, chain.ROOT_CA, m.ROOT_KEY, authority=True, path=0)
    leaf = m.certificate(
        chain.PCK, m.PCK_KEY, chain.PROCESSOR_CA, m.CA_KEY, authority=False, extension=m.sgx_extension(instance=False)
    )
    held = chain.verify_pck_chain(m.pem(leaf, ca, m.ROOT))
    assert chain.sgx_extension(held).platform_instance is None


def test_keys_are_on_p256():
    refused(m.pem(pck(ec.generate_private_key(ec.SECP384R1())), m.CA, m.ROOT), "isn't on P-256")


def test_unknown_critical_extensions():
    refused(m.pem(pck(critical=UNKNOWN), m.CA, m.ROOT), "critical extension")


def test_text_besides_certificates():
    whole = m.pem(m.PCK, m.CA, m.ROOT)
    refused(b"# chain\n" + whole, "isn't a list of PEM")
    refused(whole + b"more", "isn't a list of PEM")
    refused(b"\0" + whole, "isn't a list of PEM")
    refused(m.pem(m.PCK) * 100, "more than")


def test_certificate_without_the_extension():
    leaf = m.certificate(chain.PCK, m.PCK_KEY, chain.PLATFORM_CA, m.CA_KEY, authority=False)
    with pytest.raises(EvidenceError, match="which platform"):
        chain.sgx_extension(chain.verify_pck_chain(m.pem(leaf, m.CA, m.ROOT)))


def test_signing_chain():
    assert chain.verify_signing_chain(m.pem(m.TCB_SIGNER, m.ROOT), "chain").signer == m.TCB_SIGNER
    for certificates in ((m.TCB_SIGNER,), (m.TCB_SIGNER, m.ROOT, m.ROOT), (m.ROOT,), ()):
        with pytest.raises(EvidenceError, match="signer and root make two"):
            chain.verify_signing_chain(m.pem(*certificates), "chain")
    stranger = m.certificate(chain.PCK, m.TCB_KEY, chain.ROOT_CA, m.ROOT_KEY, authority=False)
    with pytest.raises(EvidenceError, match="isn't named"):
        chain.verify_signing_chain(m.pem(stranger, m.ROOT), "chain")


def test_list_by_the_same_key_under_another_name():
    with pytest.raises(EvidenceError, match="another issuer"):
        chain.verify_crl(m.revocation_list(m.ROOT, m.CA_KEY), m.CA, (m.PCK,), m.AT, "it")


def test_list_of_limited_scope():
    scope = x509.IssuingDistributionPoint(
        full_name=None,
        relative_name=None,
        only_contains_user_certs=False,
        only_contains_ca_certs=True,
        only_some_reasons=None,
        indirect_crl=False,
        only_contains_attribute_certs=False,
    )
    with pytest.raises(EvidenceError, match="limited by an extension"):
        chain.verify_crl(m.revocation_list(m.CA, m.CA_KEY, critical=scope), m.CA, (m.PCK,), m.AT, "it")


def test_edges_of_time():
    begin, end = int(m.BEGIN.timestamp()), int(m.END.timestamp())
    crl = m.revocation_list(m.CA, m.CA_KEY)
    for at in (begin, end):
        assert chain.verify_dates((m.PCK, m.CA, m.ROOT), at) == m.END
        assert chain.verify_crl(crl, m.CA, (m.PCK,), at, "it") == m.END
    for at in (begin - 1, end + 1):
        with pytest.raises(EvidenceError):
            chain.verify_dates((m.PCK,), at)
        with pytest.raises(EvidenceError):
            chain.verify_crl(crl, m.CA, (m.PCK,), at, "it")


def partial(make: Callable[[], bytes]) -> bytes:
    """DER whose signature claims that its last bit isn't part of it. Nothing that is signed says otherwise."""
    while (der := make())[-1] & 1:
        pass
    length = next(size for size in range(70, 73) if der[-size - 2 : -size] == bytes((size + 1, 0)))
    return der[: -length - 1] + b"\x01" + der[-length:]


def test_signatures_are_whole_bytes():
    lists = partial(lambda: m.revocation_list(m.CA, m.CA_KEY))
    with pytest.raises(EvidenceError, match="isn't signed by"):
        chain.verify_crl(lists, m.CA, (m.PCK,), m.AT, "it")
    leaf = x509.load_der_x509_certificate(partial(lambda: pck().public_bytes(Encoding.DER)))
    refused(m.pem(leaf, m.CA, m.ROOT), "isn't whole bytes")
