"""What ties evidence to one channel, one question and one audit log: the 64 bytes of report data."""

from __future__ import annotations

import hashlib
import struct

LABEL = b"cloister/report-data/v1"
REPORT_DATA_BYTES = 64
_LENGTH = struct.Struct(">I")


def report_data(spki: bytes, nonce: bytes, gpu_digest: bytes, checkpoint: bytes, log_key: bytes) -> bytes:
    """SHA-512 (64 bytes) over the label and the five fields, each after its length as u32 big-endian.

    Args:
        spki: the TLS key's SubjectPublicKeyInfo, DER.
        nonce: the client's 32 bytes.
        gpu_digest: `gpu_digest()` of the GPU's evidence.
        checkpoint: the checkpoint's UTF-8 bytes.
        log_key: the log's Ed25519 key, 32 bytes.
    """
    digest = hashlib.sha512()
    for field in (LABEL, spki, nonce, gpu_digest, checkpoint, log_key):
        digest.update(_LENGTH.pack(len(field)))
        digest.update(field)
    return digest.digest()


def gpu_digest(gpu: bytes | None) -> bytes:
    """SHA-256 (32 bytes) of the GPU's evidence; empty where the machine shows none."""
    return b"" if gpu is None else hashlib.sha256(gpu).digest()
