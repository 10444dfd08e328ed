"""The collateral that an appraisal is made with, out of all the pieces that somebody handed over.

Some pieces come from the machine that is to be judged, others from this computer's own store: the newest wins, whoever
brought it, so that a machine can't hide behind an old list. A forged piece that claims to be the newest fails the
appraisal, where its signature is checked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cloister_attest.collateral.dates import Age, Dates, read
from cloister_attest.collateral.items import Item, Kind
from cloister_attest.collateral.needs import pieces_of_snp, pieces_of_tdx
from cloister_attest.outcome import EvidenceError
from cloister_attest.snp import certificate_table as snp
from cloister_attest.tdx import collateral as tdx


def choose(items: Iterable[Item], kind: Kind, name: str, at: int) -> Item | None:
    """The piece to judge with at `at` (Unix seconds); None where there is none of that kind and name.

    Of those valid at `at` the one issued last; of Intel's documents the one of the latest TCB evaluation, then the one
    issued last. Where none is valid the one issued last, so that the check says that it has expired; one that can't be
    read only where there is nothing else.
    """
    valid: list[tuple[Age, Item]] = []
    other: list[tuple[Age, Item]] = []
    unreadable: list[Item] = []
    for item in items:
        if (item.kind, item.name) != (kind, name):
            continue
        found = _read(item)
        if found is None:
            unreadable.append(item)
        elif found[0].include(at):
            valid.append((found[1], item))
        else:
            other.append((found[1], item))
    if valid:
        return max(valid, key=lambda each: each[0])[1]
    if other:
        return max(other, key=lambda each: each[0].issued)[1]
    return unreadable[0] if unreadable else None


def snp_collateral(report: bytes, certificates: Sequence[bytes], items: Iterable[Item], at: int) -> snp.Collateral:
    """What proves a report: the certificates that came with it, completed from `items`.

    Args:
        certificates: the evidence's own, DER, the report's signer first, its root last.
        items: from anywhere; pieces of other chips and products are passed over.
        at: the moment to judge at, Unix seconds.

    Never raises: what is missing or can't be read is for the appraisal to say.
    """
    pool = tuple(items)
    try:
        own = snp.Collateral.from_certificates(certificates)
    except EvidenceError:
        return snp.Collateral()
    chosen = _chosen_snp(report, certificates, pool, at)
    vcek = chosen.get("amd-vcek")
    if own.leaf is None and vcek is not None:
        # A report of version 2 doesn't say its product; its signer's certificate does.
        chosen |= _chosen_snp(report, (vcek,), pool, at)
    issuer, crl = chosen.get("amd-ask") or chosen.get("amd-asvk"), chosen.get("amd-crl")
    found = own.completed(snp.Collateral(vcek, issuer, chosen.get("amd-ark"), crl))
    # AMD has a list for each kind of key at an address of its own, and their names are one: none hides the other.
    lists = [item for item in pool if item.kind == "amd-crl"]
    names = {item.name for item in lists if item.content == crl}
    others = dict.fromkeys(item.content for item in lists if item.name in names and item.content != crl)
    return replace(found, other_crls=tuple(others))


def tdx_collateral(quote: bytes, items: Iterable[Item], at: int) -> tdx.Collateral:
    """What Intel publishes about a quote's platform, out of `items`, to judge at `at` (Unix seconds). Never raises."""
    pool = tuple(items)
    chosen = {kind: choose(pool, kind, name, at) for kind, name in pieces_of_tdx(quote)}
    info, identity = chosen.get("intel-tcb-info"), chosen.get("intel-qe-identity")
    return tdx.Collateral(
        tcb_info=_content(info, tdx.MAX_DOCUMENT),
        tcb_info_chain=_chain(info),
        qe_identity=_content(identity, tdx.MAX_DOCUMENT),
        qe_identity_chain=_chain(identity),
        root_crl=_content(chosen.get("intel-root-crl"), tdx.MAX_CRL),
        pck_crl=_content(chosen.get("intel-pck-crl"), tdx.MAX_CRL),
    )


def _chosen_snp(report: bytes, certificates: Sequence[bytes], pool: tuple[Item, ...], at: int) -> dict[Kind, bytes]:
    found: dict[Kind, bytes] = {}
    for kind, name in pieces_of_snp(report, certificates):
        item = choose(pool, kind, name, at)
        if item is not None:
            found[kind] = item.content
    return found


def _read(item: Item) -> tuple[Dates, Age] | None:
    try:
        return read(item)
    except EvidenceError:
        return None


def _content(item: Item | None, limit: int) -> bytes | None:
    return item.content if item is not None and len(item.content) <= limit else None


def _chain(item: Item | None) -> bytes | None:
    return item.chain if item is not None and item.chain else None
