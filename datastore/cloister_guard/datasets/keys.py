"""Who holds the keys that the data keys are wrapped under."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_data.errors import ConfigurationError, StorageError
from cloister_data.policy import Platform

KEY_BYTES = 32
_NONCE_BYTES = 12
_LABEL = b"cloister/wrapped-key/v1\n"


class KeyProvider(Protocol):
    """Wraps data keys (32 bytes) under a key that never leaves the provider.

    `context` says what the key is for; a wrapped key opens under its own context only, so that a row copied to another
    dataset opens nothing.
    """

    def wrap(self, key: bytes, context: bytes) -> bytes:
        """The wrapped form of `key`. Raises StorageError where the provider is unavailable."""
        ...

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        """The key again. Raises StorageError where `wrapped` wasn't made for `context` by this provider."""
        ...


class FileKeyProvider:
    """A wrapping key in a file beside the data: for the simulated platform alone, because it protects from nobody
    who can read the disk. AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce, `context` as associated data.
    """

    def __init__(self, path: Path, *, platform: Platform) -> None:
        """Open `path`, or make it with a fresh key. Raises ConfigurationError on any platform but "simulated"."""
        if platform != "simulated":
            raise ConfigurationError(
                f"A key file can't hold the data keys on the platform {platform!r}.",
                why="Whoever reads the disk would read the data.",
                next_step="Use a key provider whose keys are released to the confidential VM.",
            )
        self._aead = AESGCM(_load_or_make(path))

    def wrap(self, key: bytes, context: bytes) -> bytes:
        nonce = secrets.token_bytes(_NONCE_BYTES)
        return nonce + self._aead.encrypt(nonce, key, _LABEL + context)

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        try:
            return self._aead.decrypt(wrapped[:_NONCE_BYTES], wrapped[_NONCE_BYTES:], _LABEL + context)
        except (InvalidTag, ValueError) as error:
            raise StorageError(
                "A stored key can't be unwrapped.",
                why="It was made under another wrapping key or for something else, or it was altered.",
                next_step="Restore the key file and the database from the same backup.",
            ) from error


def _load_or_make(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except FileExistsError:
        return _load(path)
    except OSError as error:
        raise _unusable(path, error.strerror or "it can't be made") from error
    key = secrets.token_bytes(KEY_BYTES)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        path.unlink(missing_ok=True)
        raise StorageError("The key file can't be written.", why=f"{error.strerror}.") from error
    return key


def _load(path: Path) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        with os.fdopen(descriptor, "rb") as file:
            status = os.fstat(file.fileno())
            key = file.read(KEY_BYTES + 1)
    except OSError as error:
        raise _unusable(path, error.strerror or "it can't be read") from error
    if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid() or status.st_mode & 0o077:
        raise _unusable(path, "somebody else may read or change it")
    if len(key) != KEY_BYTES:
        raise _unusable(path, f"it doesn't hold exactly {KEY_BYTES} bytes")
    return key


def _unusable(path: Path, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"The key file {path} can't be used.",
        why=f"{why[:1].upper()}{why[1:]}.",
        next_step="It must be a regular file of the guard's own user with mode 0600.",
    )
