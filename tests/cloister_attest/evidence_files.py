"""The files of published evidence, in whichever form others published them."""

from __future__ import annotations

import base64
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import unquote_to_bytes

from cryptography import x509

from cloister_attest.outcome import EvidenceError
from cloister_attest.snp.certificate_table import Collateral as SnpCollateral
from cloister_attest.snp.certificates import load_certificate
from cloister_attest.tdx import abi, chain
from cloister_attest.tdx.collateral import Collateral as TdxCollateral

ANY_MOMENT = int(datetime(2025, 6, 1, tzinfo=UTC).timestamp())
_PEM = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----(.+?)-----END \1-----", re.DOTALL)


def as_der(data: bytes) -> bytes:
    """A certificate or a list as DER, of PEM text the first one; what is neither stays as it is."""
    found = _PEM.search(data)
    if found is None:
        return data
    try:
        return base64.b64decode(b"".join(found[2].split()), validate=True)
    except ValueError:
        return data


def as_pem(data: bytes) -> bytes:
    """A chain as PEM text: PEM stays as it is, but for the percent signs of Intel's HTTP headers; DER is wrapped."""
    if data.startswith(b"-----BEGIN%20"):
        return unquote_to_bytes(data)
    if not data.startswith(b"\x30"):
        return data
    parts = []
    while data.startswith(b"\x30\x82"):
        size = 4 + int.from_bytes(data[2:4], "big")
        text = base64.encodebytes(data[:size])
        parts.append(b"-----BEGIN CERTIFICATE-----\n" + text + b"-----END CERTIFICATE-----\n")
        data = data[size:]
    return b"".join(parts) + data


def snp_moment(collateral: SnpCollateral) -> int:
    """A moment in the time of everything there, where a case names none: when the last of it began."""
    begins = []
    for given in (collateral.leaf, collateral.intermediate, collateral.root):
        with suppress(EvidenceError):
            begins.append(load_certificate(given, "certificate").not_valid_before_utc)
    return _latest(begins) if collateral.crl is None else max(_latest(begins), crl_moment(collateral.crl))


def crl_moment(crl: bytes | None) -> int:
    with suppress(ValueError):
        return _latest([x509.load_der_x509_crl(crl or b"").last_update_utc])
    return ANY_MOMENT


def tdx_moment(quote: bytes, collateral: TdxCollateral) -> int:
    begins = []
    with suppress(EvidenceError):
        pem = abi.parse_quote(quote).pck_chain
        begins += [certificate.not_valid_before_utc for certificate in chain.load_pem(pem, "chain")]
    for raw in (collateral.tcb_info, collateral.qe_identity):
        with suppress(ValueError, KeyError, AttributeError):
            for inner in json.loads(raw or b"").values():
                if isinstance(inner, dict):
                    begins.append(datetime.fromisoformat(inner["issueDate"]))
    lists = [crl_moment(crl) for crl in (collateral.root_crl, collateral.pck_crl) if crl is not None]
    return max([_latest(begins), *lists]) if begins else ANY_MOMENT


def _latest(begins: Iterable[datetime]) -> int:
    return max((int(begin.timestamp()) for begin in begins), default=ANY_MOMENT)


@contextmanager
def empty_file() -> Iterator[Path]:
    with tempfile.NamedTemporaryFile() as file:
        yield Path(file.name)
