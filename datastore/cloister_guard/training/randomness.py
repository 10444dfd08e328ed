"""Random words for sampling and noise: AES-256 in counter mode under a key that the system makes for one attempt.

The key can't be set, read or saved. A replayed noise cancels and a known seed voids the amplification by sampling, so
every attempt starts a stream of its own. torch's global generator is never used: the model's dropout sees it.
"""

from __future__ import annotations

import os

import numpy as np
import numpy.typing as npt
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

Words = npt.NDArray[np.uint64]


class KeyedStream:
    """A stream of independent uniform 64-bit words."""

    def __init__(self) -> None:
        self._encryptor = Cipher(algorithms.AES256(os.urandom(32)), modes.CTR(bytes(16))).encryptor()

    def words(self, count: int) -> Words:
        """`count` words, uint64 [count]."""
        return np.frombuffer(self._encryptor.update(bytes(8 * count)), dtype=np.uint64)

    def integer(self, bits: int) -> int:
        """A uniform integer in [0, 2**bits), `bits` a multiple of 8."""
        return int.from_bytes(self._encryptor.update(bytes(bits // 8)), "big")

    def permutation(self, count: int) -> npt.NDArray[np.int64]:
        """A uniform permutation of 0..count-1 (sorting 64-bit keys: a tie has probability below count**2 / 2**65)."""
        return np.argsort(self.words(count), kind="stable")
