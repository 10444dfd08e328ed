"""Pieces of collateral made with throw-away keys, and what they belong to."""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import cache
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

from cloister_attest.collateral.items import Item
from cloister_attest.collateral.needs import vcek_name
from tests.cloister_attest.snp import minted as amd
from tests.cloister_attest.tdx import minting as intel

TDX_AT = intel.AT
SNP_AT = amd.AT


def snp(product: Any = "Genoa", kind: Any = "VCEK", version: int = 5, crl_days: int = 0) -> amd.Minted:
    """The same answer to the same question, however it is put."""
    return _snp(product, kind, version, crl_days)


@cache
def _snp(product: Any, kind: Any, version: int, crl_days: int) -> amd.Minted:
    return amd.mint(amd.Recipe(product=product, kind=kind, version=version, crl_days=crl_days))


def as_pem(*ders: bytes | None) -> bytes:
    return b"".join(x509.load_der_x509_certificate(der or b"").public_bytes(Encoding.PEM) for der in ders)


def snp_items(product: Any = "Genoa", kind: Any = "VCEK", version: int = 5) -> tuple[Item, ...]:
    """All that AMD publishes for the report of `snp`: VCEK, ASK or ASVK, ARK, list."""
    found = snp(product, kind, version).collateral
    assert found.leaf
    assert found.intermediate
    assert found.root
    assert found.crl
    name = vcek_name(amd.HWID[product], amd.TCB[product])
    issuer: Any = "amd-ask" if kind == "VCEK" else "amd-asvk"
    leaf = (Item(kind="amd-vcek", name=name, content=found.leaf, chain=b""),) if kind == "VCEK" else ()
    return (
        *leaf,
        Item(kind=issuer, name=product, content=found.intermediate, chain=b""),
        Item(kind="amd-ark", name=product, content=found.root, chain=b""),
        Item(kind="amd-crl", name=product, content=found.crl, chain=b""),
    )


@cache
def root_crl(begin: datetime = intel.BEGIN, end: datetime = intel.END) -> Item:
    content = intel.revocation_list(intel.ROOT, intel.ROOT_KEY, begin=begin, end=end)
    return Item(kind="intel-root-crl", name="root", content=content, chain=b"")


@cache
def pck_crl(begin: datetime = intel.BEGIN, end: datetime = intel.END) -> Item:
    content = intel.revocation_list(intel.CA, intel.CA_KEY, begin=begin, end=end)
    return Item(kind="intel-pck-crl", name="platform", content=content, chain=b"")


@cache
def tcb_info(
    begin: datetime = intel.BEGIN, end: datetime = intel.END, evaluation: int = 18, chain: bytes | None = None
) -> Item:
    value = intel.changed(
        intel.TCB_INFO,
        issueDate=intel.stamp(begin),
        nextUpdate=intel.stamp(end),
        tcbEvaluationDataNumber=evaluation,
    )
    signers = intel.pem(intel.TCB_SIGNER, intel.ROOT) if chain is None else chain
    return Item(kind="intel-tcb-info", name=intel.FMSPC.hex(), content=intel.document("tcbInfo", value), chain=signers)


@cache
def qe_identity() -> Item:
    content = intel.document("enclaveIdentity", intel.QE_IDENTITY)
    return Item(kind="intel-qe-identity", name="td", content=content, chain=intel.pem(intel.TCB_SIGNER, intel.ROOT))


def tdx_items() -> tuple[Item, ...]:
    return (root_crl(), pck_crl(), tcb_info(), qe_identity())


def days(count: float) -> timedelta:
    return timedelta(days=count)
