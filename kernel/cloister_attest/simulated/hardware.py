"""A simulated processor: it signs reports with a key that hangs on a throw-away root."""

from __future__ import annotations

import hashlib
import stat
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Self

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.utils import decode_dss_signature
from cryptography.hazmat.primitives.hashes import SHA384
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from cloister_attest.policy import AttestationPolicy
from cloister_attest.simulated.abi import pack_body, pack_signature
from cloister_attest.simulated.policy import SimulatedPolicy
from cloister_attest.simulated.verify import CHIP_OID
from cloister_data.errors import ConfigurationError, StorageError
from cloister_data.files import replace_whole
from cloister_data.policy import Platform

DEFAULT_TCB = 1
ROOT_DAYS = 3650
LEAF_DAYS = 366
CLOCK_SKEW = timedelta(days=1)
"""How far behind this machine's clock a client's may be."""


class SimulatedHardware:
    """Makes reports as a confidential processor would, and certificates as its maker would.

    Attributes:
        root: the throw-away root certificate.
        measurement: 48 bytes; what the reports say that the machine runs.
        chip_id: 64 bytes that stand for this machine, derived from the root's key.
    """

    platform: Final[Platform] = "simulated"

    def __init__(
        self,
        root_key: ec.EllipticCurvePrivateKey,
        root: x509.Certificate,
        measurement: bytes,
        *,
        debug: bool = False,
        tcb: int = DEFAULT_TCB,
        chip_id: bytes | None = None,
    ) -> None:
        self.root = root
        self.measurement = measurement
        self.debug = debug
        self.tcb = tcb
        spki = root_key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
        self.chip_id = hashlib.sha512(b"cloister/simulated-chip/v1" + spki).digest() if chip_id is None else chip_id
        self._leaf_key = ec.generate_private_key(ec.SECP384R1())
        self.leaf = _issue_leaf(root_key, root, self._leaf_key, self.chip_id, tcb)

    @classmethod
    def generate(
        cls, measurement: bytes, *, debug: bool = False, tcb: int = DEFAULT_TCB, chip_id: bytes | None = None
    ) -> Self:
        """A machine with a root of its own, in memory only."""
        key = ec.generate_private_key(ec.SECP384R1())
        return cls(key, issue_root(key), measurement, debug=debug, tcb=tcb, chip_id=chip_id)

    @classmethod
    def from_file(cls, path: Path, measurement: bytes) -> Self:
        """A machine whose root is kept in `path` (PEM, key and certificate, mode 0600) and is made where absent.

        Raises ConfigurationError for a file that is open to others or isn't such a root.
        """
        if not path.exists():
            key = ec.generate_private_key(ec.SECP384R1())
            _store(path, key, issue_root(key))
        try:
            if stat.S_IMODE(path.stat().st_mode) & 0o077:
                raise ConfigurationError(
                    f"The simulated root {path} is open to other users.",
                    next_step=f"Close it: chmod 600 {path}; or delete it, and every client gets a new trust file.",
                )
            content = path.read_bytes()
            loaded = load_pem_private_key(content, None)
            root = x509.load_pem_x509_certificate(content)
        except (OSError, ValueError, TypeError) as error:
            raise ConfigurationError(
                f"The simulated root {path} can't be read.",
                why=f"{error}.",
                next_step="Delete it to have a new one made; every client then needs the new trust file.",
            ) from error
        if not isinstance(loaded, ec.EllipticCurvePrivateKey) or loaded.public_key() != root.public_key():
            raise ConfigurationError(
                f"The simulated root {path} holds a key and a certificate that don't belong together."
            )
        return cls(loaded, root, measurement)

    def collect(self, report_data: bytes) -> tuple[bytes, tuple[bytes, ...]]:
        """A signed report over 64 bytes of report data, and its certificates (DER, leaf first)."""
        body = pack_body(
            debug=self.debug,
            measurement=self.measurement,
            report_data=report_data,
            chip_id=self.chip_id,
            tcb=self.tcb,
        )
        r, s = decode_dss_signature(self._leaf_key.sign(body, ec.ECDSA(SHA384())))
        return body + pack_signature(r, s), (self.leaf.public_bytes(Encoding.DER), self.root.public_bytes(Encoding.DER))

    def trust(self) -> AttestationPolicy:
        """The trust file that accepts exactly this machine's root, image and chip, whatever its log is called."""
        return AttestationPolicy(
            format=2,
            publisher="none",
            gpu="forbidden",
            log_key="any",
            log_origin="any",
            hardware=SimulatedPolicy(
                platform="simulated",
                roots=(hashlib.sha256(self.root.public_bytes(Encoding.DER)).hexdigest(),),
                measurements=(self.measurement.hex(),),
                debug="forbidden",
                minimum_tcb=self.tcb,
                chips_allowed=(self.chip_id.hex(),),
                chips_denied=(),
            ),
        )

    def writers(self) -> AttestationPolicy:
        """This machine's root, with any chip and image: a log outlives versions, and may be shared."""
        return self.trust().demanding(measurements="any", minimum_tcb="any", chips_allowed="any")


def issue_root(key: ec.EllipticCurvePrivateKey) -> x509.Certificate:
    """A self-signed root for a P-384 key."""
    name = _name("Cloister SIMULATED root: trust nothing that it signs")
    return _builder(name, name, key.public_key(), ROOT_DAYS, issuer=True).sign(key, SHA384())


def _issue_leaf(
    root_key: ec.EllipticCurvePrivateKey,
    root: x509.Certificate,
    key: ec.EllipticCurvePrivateKey,
    chip_id: bytes,
    tcb: int,
) -> x509.Certificate:
    extension = x509.UnrecognizedExtension(CHIP_OID, chip_id + tcb.to_bytes(8, "big"))
    return (
        _builder(root.subject, _name("Cloister SIMULATED chip"), key.public_key(), LEAF_DAYS, issuer=False)
        .add_extension(extension, critical=False)
        .sign(root_key, SHA384())
    )


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _builder(
    issuer_name: x509.Name, subject: x509.Name, key: ec.EllipticCurvePublicKey, days: int, *, issuer: bool
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer_name)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - CLOCK_SKEW)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.BasicConstraints(ca=issuer, path_length=0 if issuer else None), critical=True)
        .add_extension(
            x509.KeyUsage(
                digital_signature=not issuer,
                content_commitment=False,
                key_encipherment=False,
                data_encipherment=False,
                key_agreement=False,
                key_cert_sign=issuer,
                crl_sign=issuer,
                encipher_only=False,
                decipher_only=False,
            ),
            critical=True,
        )
    )


def _store(path: Path, key: ec.EllipticCurvePrivateKey, root: x509.Certificate) -> None:
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) + root.public_bytes(Encoding.PEM)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_whole(path, lambda file: file.write(pem))
    except OSError as error:
        raise StorageError(f"The simulated root {path} can't be written.", why=f"{error.strerror}.") from error
