"""Which pieces of collateral an appraisal of some evidence takes, and where the processor's maker publishes them.

Sources: AMD 57230 (VCEK and its key distribution service, KDS) and 58369 (VLEK); Intel PCS API, version 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from cryptography import x509
from cryptography.x509.oid import NameOID

from cloister_attest.collateral.items import Kind
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp import abi
from cloister_attest.snp.certificates import common_name, load_certificate
from cloister_attest.snp.products import HWID_BYTES, PRODUCTS, Product, decode_tcb
from cloister_attest.tdx import chain
from cloister_attest.tdx import collateral as pcs
from cloister_attest.tdx.abi import parse_quote

KDS = "https://kdsintf.amd.com"
KDS_VCEK = KDS + "/vcek/v1/{product}/{hwid}?{levels}"
KDS_CHAIN = KDS + "/{service}/v1/{product}/cert_chain"
"""PEM: the ASK (of "vcek") or ASVK (of "vlek"), then the ARK."""
KDS_CRL = KDS + "/{service}/v1/{product}/crl"
"""DER, signed by the ARK."""

MAX_CERTIFICATES = 8


class Piece(NamedTuple):
    """One item's kind and name."""

    kind: Kind
    name: str


@dataclass(frozen=True)
class Need:
    """One document that the maker publishes.

    Attributes:
        kind, name: of the item in it; a chain of AMD's also holds the root (`pieces`).
        url: where the maker publishes it.
        what: for people.
    """

    kind: Kind
    name: str
    url: str
    what: str

    @property
    def pieces(self) -> tuple[Piece, ...]:
        """Every item that the document holds."""
        own = Piece(self.kind, self.name)
        return (own, Piece("amd-ark", self.name)) if self.kind in ("amd-ask", "amd-asvk") else (own,)


@dataclass(frozen=True)
class Signer:
    """What the report and the certificates that came with it say about the report's signer. Nothing is proven.

    `product` is None where none of them says it; `leaf` is the signer's certificate (DER), where it came.
    """

    report: abi.Report
    product: Product | None
    leaf: bytes | None

    @property
    def vcek_name(self) -> str | None:
        """The name of the signer's "amd-vcek"; None where the report doesn't name its chip, or no VCEK signed it."""
        report = self.report
        if report.signing_key != "VCEK" or report.chip_id_masked:
            return None
        hwid = report.chip_id[: HWID_BYTES[self.product]] if self.product else report.chip_id
        return vcek_name(hwid, report.reported_tcb)


def vcek_name(hwid: bytes, tcb: bytes) -> str:
    """The name of an "amd-vcek": hardware id (64 bytes, on Turin 8) and TCB_VERSION (8 bytes)."""
    return f"{hwid.hex()}-{tcb.hex()}"


def signer_of(report: bytes, certificates: Sequence[bytes], product: Product | None = None) -> Signer:
    """Raises EvidenceError where the report can't be read; a certificate that can't is passed over.

    `product` counts where neither the report nor a certificate says it.
    """
    parsed = abi.parse(report)
    leaf, named = None, None
    for der in certificates[:MAX_CERTIFICATES]:
        try:
            certificate = load_certificate(der, "evidence")
            if common_name(certificate, "leaf") in ("SEV-VCEK", "SEV-VLEK"):
                leaf = leaf or der
            named = named or product_of(certificate)
        except EvidenceError:
            continue
    return Signer(parsed, parsed.product or named or product, leaf)


def product_of(certificate: x509.Certificate) -> Product | None:
    """The product in the name of an AMD authority: the certificate's own, or its issuer's. None where there is none."""
    for name in (certificate.subject, certificate.issuer):
        for attribute in name.get_attributes_for_oid(NameOID.COMMON_NAME):
            for prefix in ("ARK-", "SEV-VLEK-", "SEV-"):
                for product in PRODUCTS:
                    if attribute.value == prefix + product:
                        return product
    return None


def needs_of_snp(report: bytes, certificates: Sequence[bytes], product: Product | None = None) -> tuple[Need, ...]:
    """What AMD publishes for the appraisal of a report: its VCEK unless that came with it, the chain, and the list.

    Args:
        certificates: what came with the report, DER.
        product: for a report of version 2 without certificates, which doesn't say it.

    Raises EvidenceError where AMD can't be asked: the report can't be read, its product isn't known, or only the host
    has the signer's certificate.
    """
    signer = signer_of(report, certificates, product)
    key = signer.report.signing_key
    if key == "NONE":
        raise EvidenceError("no key signed the report, so that no certificate of AMD's can prove it")
    if signer.leaf is None and key == "VLEK":
        raise EvidenceError(
            "a VLEK signed the report, and its certificate isn't there: AMD hands it to the cloud provider alone, "
            "whose host must pass it on with the evidence"
        )
    if signer.leaf is None and signer.report.chip_id_masked:
        raise EvidenceError(
            "the report's chip id is masked and the signer's certificate isn't there: only the provider's host can "
            "fetch it, and must pass it on with the evidence"
        )
    if signer.product is None:
        raise EvidenceError(
            f"a report of version {signer.report.version} doesn't say its processor, and no certificate that says it "
            f"came with it: name the product ({', '.join(PRODUCTS)})"
        )
    issuer = _chain_and_list(signer.product, vlek=key == "VLEK")
    return issuer if signer.leaf is not None else (_vcek(signer, signer.product), *issuer)


def _vcek(signer: Signer, product: Product) -> Need:
    report = signer.report
    hwid, rest = report.chip_id[: HWID_BYTES[product]], report.chip_id[HWID_BYTES[product] :]
    if any(rest):
        raise EvidenceError(f"the report's chip id is longer than that of a {product}")
    tcb = decode_tcb(report.reported_tcb, product)
    levels = f"blSPL={tcb.bootloader}&teeSPL={tcb.tee}&snpSPL={tcb.snp}&ucodeSPL={tcb.microcode}"
    if tcb.fmc is not None:
        levels = f"fmcSPL={tcb.fmc}&{levels}"
    url = KDS_VCEK.format(product=product, hwid=hwid.hex(), levels=levels)
    what = f"VCEK of the {product} chip {hwid.hex()[:16]}"
    return Need("amd-vcek", vcek_name(hwid, report.reported_tcb), url, what)


def _chain_and_list(product: Product, *, vlek: bool) -> tuple[Need, ...]:
    service = "vlek" if vlek else "vcek"
    kind: Kind = "amd-asvk" if vlek else "amd-ask"
    title = "ASVK" if vlek else "ASK"
    return (
        Need(kind, product, KDS_CHAIN.format(service=service, product=product), f"{title} and ARK of {product}"),
        Need("amd-crl", product, KDS_CRL.format(service=service, product=product), f"revocation list of {product}"),
    )


def needs_of_tdx(quote: bytes) -> tuple[Need, ...]:
    """What Intel publishes for the appraisal of a quote. Raises EvidenceError where its platform can't be read."""
    ca, fmspc = platform_of(quote)
    return (
        Need("intel-root-crl", "root", pcs.PCS_ROOT_CRL, "revocation list of Intel's root"),
        Need("intel-pck-crl", ca, pcs.PCS_PCK_CRL.format(ca=ca), f"revocation list of Intel's {ca} CA"),
        Need("intel-tcb-info", fmspc, pcs.PCS_TCB_INFO.format(fmspc=fmspc), f"TCB info of platforms {fmspc}"),
        Need("intel-qe-identity", "td", pcs.PCS_QE_IDENTITY, "identity of Intel's quoting enclave"),
    )


def platform_of(quote: bytes) -> tuple[str, str]:
    """("platform" or "processor", FMSPC in hex) of the quote's PCK chain. Raises EvidenceError."""
    held = chain.verify_pck_chain(parse_quote(quote).pck_chain)
    ca = "processor" if held.ca_name == chain.PROCESSOR_CA else "platform"
    return ca, chain.sgx_extension(held).fmspc.hex()


def pieces_of_snp(report: bytes, certificates: Sequence[bytes]) -> tuple[Piece, ...]:
    """The items that could serve an appraisal of the report; never raises, and names none for one that can't be read.

    Without a product they can be no more than the VCEK, whose certificate then says the product.
    """
    try:
        signer = signer_of(report, certificates)
    except EvidenceError:
        return ()
    name = signer.vcek_name
    found = [Piece("amd-vcek", name)] if name is not None else []
    if signer.product is not None:
        for need in _chain_and_list(signer.product, vlek=signer.report.signing_key == "VLEK"):
            found.extend(need.pieces)
    return tuple(found)


def pieces_of_tdx(quote: bytes) -> tuple[Piece, ...]:
    """The items that could serve an appraisal of the quote; never raises."""
    found = [Piece("intel-root-crl", "root"), Piece("intel-qe-identity", "td")]
    try:
        ca, fmspc = platform_of(quote)
    except EvidenceError:
        return tuple(found)
    return (*found, Piece("intel-pck-crl", ca), Piece("intel-tcb-info", fmspc))
