"""Who holds the keys that the data keys are wrapped under."""

from __future__ import annotations

import hmac
import os
import secrets
import stat
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Protocol

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_data.errors import ConfigurationError, ConflictError, StorageError
from cloister_data.policy import Platform

KEY_BYTES = 32
_NONCE_BYTES = 12
_LABEL = b"cloister/wrapped-key/v1\n"
_SPLIT_LABEL = b"cloister/split-secret/v1\n"


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


class KeyRing:
    """The guard's data keys, wrapped for the owners whose data they open.

    An owner with a witness lends the guard a key, and while they don't, nothing of theirs is wrapped or unwrapped. The
    others' keys are wrapped by the machine's own provider. What comes from several owners' data opens only while all of
    them lend their keys. `lent` answers the key (32 bytes) that an owner lends, or None for an owner without a witness;
    it raises UnavailableError while an owner's data are locked.
    """

    def __init__(self, machine: KeyProvider, lent: Callable[[str], bytes | None]) -> None:
        self._machine = machine
        self._lent = lent

    def wrap(self, secret: bytes, context: bytes, owners: Collection[str]) -> bytes:
        """The wrapped form of a key, or of a longer text. Raises UnavailableError, or StorageError."""
        found = secret
        for provider in self._providers(owners):
            found = provider.wrap(found, _for_owners(context, owners))
        return found

    def unwrap(self, wrapped: bytes, context: bytes, owners: Collection[str]) -> bytes:
        """What was wrapped for the same context and owners. Raises UnavailableError, or StorageError."""
        found = wrapped
        for provider in reversed(self._providers(owners)):
            found = provider.unwrap(found, _for_owners(context, owners))
        return found

    def split_secret(self, owner: str) -> bytes | None:
        """The secret (32 bytes) behind an owner's train and test split; None where the machine's own is to be used."""
        lent = self._lent(owner)
        return None if lent is None else hmac.digest(lent, _SPLIT_LABEL, "sha256")

    def _providers(self, owners: Collection[str]) -> list[KeyProvider]:
        lent = [self._lent(owner) for owner in sorted(set(owners))]
        of_owners: list[KeyProvider] = [LentKey(key) for key in lent if key is not None]
        return of_owners if of_owners and None not in lent else [self._machine, *of_owners]


def _for_owners(context: bytes, owners: Collection[str]) -> bytes:
    return b"\n".join((context, *(owner.encode() for owner in sorted(set(owners)))))


class WrappingKey:
    """A key (32 bytes) in memory, for AES-256-GCM (NIST SP 800-38D) with a random 96-bit nonce.

    `context` is the associated data; `next_step` says what to do where something doesn't open.
    """

    def __init__(self, key: bytes, next_step: str) -> None:
        self._aead = AESGCM(key)
        self._next_step = next_step

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
                next_step=self._next_step,
            ) from error


class LentKey(WrappingKey):
    """A wrapping key that an owner's witness lends."""

    def __init__(self, key: bytes) -> None:
        super().__init__(key, "Let the owner serve with the key of `cloister owner init`: cloister owner serve.")


class FileKeyProvider(WrappingKey):
    """A wrapping key in a file beside the data: for the simulated platform alone, because it protects from nobody
    who can read the disk.
    """

    def __init__(self, path: Path, *, platform: Platform) -> None:
        """Open `path`, or make it with a fresh key. Raises ConfigurationError on any platform but "simulated"."""
        if platform != "simulated":
            raise ConfigurationError(
                f"A key file can't hold the data keys on the platform {platform!r}.",
                why="Whoever reads the disk would read the data.",
                next_step="Use a key provider whose keys are released to the confidential VM.",
            )
        super().__init__(_load_or_make(path), "Restore the key file and the database from the same backup.")


class NoMachineKey:
    """In the place of a machine's own key, on real hardware: there is none, so that data open by their owners alone."""

    def wrap(self, key: bytes, context: bytes) -> bytes:
        raise _owner_without_key("Nothing was stored.")

    def unwrap(self, wrapped: bytes, context: bytes) -> bytes:
        raise _owner_without_key("Nothing was opened.")


def _owner_without_key(outcome: str) -> ConflictError:
    return ConflictError(
        f"This owner has no witness. {outcome}",
        why="On real hardware data keys come from the owner only: this machine keeps none of its own.",
        next_step="The owner makes one before the first upload, and lets it run: cloister owner init, then cloister "
        "owner serve.",
    )


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
