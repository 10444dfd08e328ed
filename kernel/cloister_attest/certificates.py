"""Reading certificates and lists, hostile ones too: what cryptography itself lets pass, or only warns about.

AMD numbers every VCEK 0, which is no fault here. A name whose parts have lengths that no name has (a country of eleven
letters) is: cryptography would warn each time that anybody looks at the name, so it isn't read at all.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding

_loading = threading.RLock()


@contextmanager
def quietly() -> Iterator[None]:
    """Within the block no warning is heard, but that of an impossible name: it is raised."""
    # The filters of warnings belong to the whole process: one thread at a time may change and restore them.
    with _loading, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", message="Attribute's length must be", category=UserWarning)
        yield


def parse_all(certificate: x509.Certificate) -> x509.Certificate:
    """The same certificate; the parts that are parsed where they are first looked at have been parsed.

    Raises what cryptography raises for malformed parts, of which it has several classes.
    """
    with quietly():
        _ = (certificate.subject, certificate.issuer, certificate.public_key(), certificate.extensions)
        _ = (certificate.not_valid_before_utc, certificate.not_valid_after_utc, certificate.serial_number)
    return certificate


def serial_number(certificate: x509.Certificate) -> int:
    """The certificate's number, which needn't be positive."""
    with quietly():
        return certificate.serial_number


def whole_signature(signed: x509.Certificate | x509.CertificateRevocationList) -> bool:
    """Whether the signature is whole bytes (X.690, 8.6.2: the byte before a bit string counts its unused bits).

    cryptography doesn't look at that byte, so that it could be changed without anybody's notice.
    """
    return signed.public_bytes(Encoding.DER).endswith(b"\0" + signed.signature)
