"""An owner's witness: lends a cloister the key to the owner's data, for as long as its audit log only grows.

It verifies the guard's evidence, keeps its own copy of the log, signs for it, and calls again. Silence locks the data.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloister import session as sessions
from cloister.mirror import Mirror
from cloister.profile import Profile, load_ed25519, read_bounded, write_private
from cloister.session import Session
from cloister_data.checkpoint import CheckpointError
from cloister_data.cosignature import witness_name
from cloister_data.errors import (
    AttestationRefusedError,
    ConfigurationError,
    InternalError,
    StorageError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)
from cloister_data.owner import public_bytes
from cloister_data.witness import MAX_WAIT_SECONDS, UNLOCK_BYTES, WitnessAnswer, WitnessCall, sign_call

INIT = "cloister owner init"
SHORTEST_PAUSE, LONGEST_PAUSE = 0.2, 5.0
"""Seconds between two tries while the cloister can't be reached, or has trouble of its own."""

Told = Callable[[str], None]
"""Hears, in sentences for people, what the witness does."""


@dataclass(frozen=True)
class WitnessKeys:
    """What the witness alone holds. Whoever loses `unlock` (32 bytes) loses the data with it."""

    directory: Path
    signing: Ed25519PrivateKey
    unlock: bytes

    @property
    def public(self) -> bytes:
        return public_bytes(self.signing)


def witness_directory(profile: Profile) -> Path:
    return profile.directory / "witness"


def keys_of(profile: Profile, *, create: bool = False) -> WitnessKeys:
    """The witness's keys, made where absent only if `create` says so. Raises ConfigurationError, StorageError."""
    directory = witness_directory(profile)
    signing = load_ed25519(directory / "witness.pem", create=create, missing=f"It is made by `{INIT}`.")
    path = directory / "unlock.key"
    if create and not path.exists():
        write_private(path, secrets.token_bytes(UNLOCK_BYTES))
    try:
        unlock = read_bounded(path, secret=True)
    except FileNotFoundError as error:
        raise ConfigurationError(
            f"The key to the owner's data, {path}, is missing.", next_step=f"Put it back from your backup, or: {INIT}."
        ) from error
    if len(unlock) != UNLOCK_BYTES:
        raise ConfigurationError(f"{path} doesn't hold {UNLOCK_BYTES} bytes.", next_step="Put it back from a backup.")
    return WitnessKeys(directory, signing, unlock)


@contextmanager
def opened(keys: WitnessKeys, owner: str) -> Iterator[Mirror]:
    """The witness's copy of the log, for this process alone: two with one memory could sign for two logs."""
    descriptor = os.open(keys.directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigurationError(
                f"Another witness runs with {keys.directory}.", next_step="Stop that one first."
            ) from error
        yield Mirror(keys.directory, witness_name(owner), keys.signing)
    finally:
        os.close(descriptor)


class Witness:
    """Serves one cloister, at one address, until `stop` is set. Several may share a mirror: guards on one database."""

    def __init__(self, profile: Profile, keys: WitnessKeys, mirror: Mirror, owner: str, told: Told) -> None:
        self._profile = profile
        self._keys = keys
        self._mirror = mirror
        self._owner = owner
        self._told = told
        self._unlocked = False

    def serve(self, stop: threading.Event) -> None:
        """Returns once `stop` is set.

        Raises AttestationRefusedError where the machine isn't proven; LogVerificationError or ConflictError where its
        log isn't the one that was signed for; StorageError where the copy can't be kept. Nothing is unlocked then.
        """
        pause = SHORTEST_PAUSE
        while not stop.is_set():
            size = self._mirror.position()[0]
            try:
                with sessions.open(self._profile, need_token=False) as session:
                    if session.checkpoint.size < size:
                        raise AttestationRefusedError(
                            "The cloister's audit log was set back. Nothing was signed and nothing unlocked.",
                            why=f"It has {session.checkpoint.size} entries; this witness has signed for {size}.",
                            next_step="Ask the operator. A restore starts from your copy: cloister owner backup.",
                        )
                    self._converse(session, stop)
            except (UnreachableError, UnavailableError) as error:
                self._told(f"{self._profile.url}: {error.what} {error.why} Trying again.")
            except _Restarted:
                self._told(f"{self._profile.url}: the cloister was restarted; verifying it anew.")
            # Only a conversation that went well begins with a short pause again.
            pause = SHORTEST_PAUSE if self._unlocked else min(LONGEST_PAUSE, pause * 2)
            self._unlocked = False
            stop.wait(pause)

    def _converse(self, session: Session, stop: threading.Event) -> None:
        certificate = bytes.fromhex(session.certificate_digest)
        checked, wait = False, 0
        while not stop.is_set():
            size, line = self._mirror.position()
            call = WitnessCall(
                owner=self._owner,
                size=size,
                cosignature=line,
                unlock=self._keys.unlock if checked else None,
                wait=wait,
            )
            try:
                answer = session.transport.call(
                    "POST", "/witness", sign_call(call, self._keys.signing, certificate), WitnessAnswer
                )
            except AttestationRefusedError as error:
                raise _Restarted from error
            except (StorageError, InternalError, TooManyRequestsError) as error:
                # The guard's own trouble, which may pass: what it says of its log is refused as something else.
                raise UnavailableError(error.what, why=error.why) from error
            try:
                checkpoint = self._mirror.extend(
                    size, answer.entries, answer.evidence, answer.checkpoint, session.log_key
                )
            except CheckpointError as error:
                raise AttestationRefusedError(
                    "The cloister shows a checkpoint that isn't its own. Nothing was signed.", why=f"{error}."
                ) from error
            # Up to the checkpoint in the evidence: what the machine was proven with is what was signed for.
            checked = checked or checkpoint.size >= session.checkpoint.size
            wait = int(min(MAX_WAIT_SECONDS, max(1.0, answer.lease / 3))) if answer.lease else 0
            if answer.lease and not self._unlocked:
                self._unlocked = True
                self._told(
                    f"{self._profile.url}: the data of {self._owner} are open; {checkpoint.size} entries signed for."
                )


class _Restarted(Exception):
    """The guard's key is another one than the verified one."""
