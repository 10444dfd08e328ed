"""A parser with a fault that only guidance finds: the positive control of the fuzzer, and no target of a plain run."""

from __future__ import annotations

SEED = b"RPRT\x01\x00\x00\x00"


def parse(data: bytes) -> int:
    """Two fields and a flag that nobody thought of."""
    if len(data) < 8 or data[:4] != b"RPRT":
        return 0
    if data[4] == 2 and data[5] == 0x7F:
        return data[data[6] + 8]
    return data[4]
