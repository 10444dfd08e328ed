"""Profiles: what this computer remembers of a cloister it connects to. Files below `home()`, closed to other users.

profiles/NAME/profile.json     where it is, who connects, and the trust file
profiles/NAME/token.json       the session token (0600)
profiles/NAME/checkpoint.json  the last audit log checkpoint that was verified
profiles/NAME/owner.pem        the owner's signing key (0600); the only copy
profiles/NAME/witness/         the owner's witness: its keys (0600), and its copy of the audit log
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal, NamedTuple, TypeVar

import httpx
import platformdirs
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, load_pem_private_key
from pydantic import Field, StringConstraints, ValidationError, field_validator

from cloister_attest.policy import AttestationPolicy, load_policy
from cloister_budget.merkle import LogVerificationError, verify_consistency
from cloister_data.base import UserName, Wire
from cloister_data.checkpoint import MAX_SIZE, Checkpoint
from cloister_data.errors import AttestationRefusedError, ConfigurationError, StorageError
from cloister_data.files import replace_whole
from cloister_data.identity import LoginAnswer

W = TypeVar("W", bound=Wire)

ProfileName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]

MAX_FILE = 1 << 20
CONNECT = "cloister connect URL --trust FILE"
DEFAULT_PORT = 443
REATTEST_SECONDS = 600
MIN_REATTEST_SECONDS, MAX_REATTEST_SECONDS = 10, 86400


class Address(NamedTuple):
    """Where a cloister listens."""

    host: str
    port: int

    @property
    def authority(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{host}:{self.port}"


def parse_url(url: str) -> Address:
    """The address in `https://host[:port]`. Raises ConfigurationError for anything more or less than that."""
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise _wrong_url(url, "It can't be read.") from error
    if parsed.scheme != "https" or not parsed.host:
        raise _wrong_url(url, "It must begin with https:// and name a host.")
    if parsed.userinfo or parsed.path not in ("", "/") or parsed.query or parsed.fragment:
        raise _wrong_url(url, "It holds more than a host and a port.")
    port = DEFAULT_PORT if parsed.port is None else parsed.port
    if not 0 < port < 65536:
        raise _wrong_url(url, f"There is no port {port}.")
    return Address(parsed.host, port)


class Remembered(Wire):
    """The newest checkpoint that was seen of the log behind `url`."""

    url: str = Field(max_length=1024)
    origin: str = Field(max_length=256)
    log_key: bytes = Field(min_length=32, max_length=32)
    size: int = Field(ge=0, le=MAX_SIZE)
    root: bytes = Field(min_length=32, max_length=32)

    def refuse_rollback(self, checkpoint: Checkpoint, consistency: Sequence[bytes]) -> None:
        """Raises AttestationRefusedError unless the log of `checkpoint` is shown to extend the one that was seen.

        A log only grows, also when its key changes at a restart of the cloister. `consistency` is the RFC 6962 proof
        (32 bytes each) from the size that was seen.
        """
        if checkpoint.origin != self.origin:
            found = f"The log is called {checkpoint.origin!r} now; it was {self.origin!r}."
        elif checkpoint.size < self.size:
            found = f"It has {checkpoint.size} entries now; {self.size} were seen before."
        else:
            try:
                verify_consistency(self.size, checkpoint.size, self.root, checkpoint.root, consistency)
            except LogVerificationError:
                found = f"Its first {self.size} entries aren't shown to be those that were seen before."
            else:
                return
        raise AttestationRefusedError(
            "The cloister's audit log was set back or replaced. Nothing was sent.",
            why=f"{found} Seen: {self.size} entries, root {self.root.hex()}. Shown: {checkpoint.size} entries, root "
            f"{checkpoint.root.hex()}.",
            next_step="Ask the operator and the data's owner why. Where it was a restore that you accept, connect "
            f"under a new name: {CONNECT} --name NAME.",
        )


class Profile(Wire):
    """One cloister that this computer knows.

    Attributes:
        url: `https://host[:port]`.
        user: who signs in, or None where nobody has yet.
        trust: absolute path of the trust file.
        reattest_seconds: how often an open session asks the machine for evidence again.
    """

    format: Literal[1] = 1
    name: ProfileName
    url: str = Field(max_length=1024)
    user: UserName | None = None
    trust: Path
    reattest_seconds: int = Field(default=REATTEST_SECONDS, ge=MIN_REATTEST_SECONDS, le=MAX_REATTEST_SECONDS)

    @field_validator("url")
    @classmethod
    def _address(cls, url: str) -> str:
        try:
            parse_url(url)
        except ConfigurationError as error:
            raise ValueError(str(error)) from error
        return url.rstrip("/")

    @field_validator("trust")
    @classmethod
    def _absolute(cls, trust: Path) -> Path:
        return trust.expanduser().absolute()

    @property
    def directory(self) -> Path:
        return _profiles() / self.name

    @property
    def address(self) -> Address:
        return parse_url(self.url)

    def save(self) -> None:
        """Write the profile, over an earlier one of the same name. Raises StorageError."""
        write_private(self.directory / "profile.json", self.to_json())

    def policy(self) -> AttestationPolicy:
        """The trust file, read anew. Raises ConfigurationError."""
        return load_policy(self.trust)

    def token(self) -> LoginAnswer | None:
        """The stored token, expired or not; None where there is none, or where it belongs to another address."""
        stored = read_wire(self.directory / "token.json", _StoredToken, secret=True)
        return stored.answer if stored is not None and stored.url == self.url else None

    def store_token(self, answer: LoginAnswer) -> None:
        write_private(self.directory / "token.json", _StoredToken(url=self.url, answer=answer).to_json())

    def forget_token(self) -> None:
        try:
            (self.directory / "token.json").unlink(missing_ok=True)
        except OSError as error:
            raise _cannot_write(self.directory / "token.json", error) from error

    def remembered(self) -> Remembered | None:
        """The newest checkpoint seen at this profile's address."""
        stored = read_wire(self.directory / "checkpoint.json", Remembered)
        return stored if stored is not None and stored.url == self.url else None

    def remember(self, checkpoint: Checkpoint, log_key: bytes) -> None:
        """Keep `checkpoint` unless a larger one of this log is kept already (another process may have seen it)."""
        fresh = Remembered(
            url=self.url, origin=checkpoint.origin, log_key=log_key, size=checkpoint.size, root=checkpoint.root
        )
        with self._locked():
            known = self.remembered()
            if known is None or known.size <= fresh.size:
                write_private(self.directory / "checkpoint.json", fresh.to_json())

    def owner_key(self, *, create: bool = False) -> Ed25519PrivateKey:
        """The owner's signing key. It is made where absent only if `create` says so. Raises ConfigurationError."""
        with self._locked():
            return load_ed25519(
                self.directory / "owner.pem",
                create=create,
                missing="It is made at the first upload, or by `cloister owner init`, and signs the policies.",
            )

    def home_key(self) -> str:
        """The key of this user's home there, 64 hex digits, made at its first use. Raises ConfigurationError."""
        path = self.directory / "home.key"
        with self._locked():
            try:
                found = read_bounded(path, secret=True, limit=256).decode("ascii", errors="replace").strip()
            except FileNotFoundError:
                found = secrets.token_hex(32)
                write_private(path, f"{found}\n".encode())
        if not re.fullmatch("[0-9a-f]{64}", found):
            raise ConfigurationError(
                f"{path} isn't a home's key.", next_step="Take it from your other computer: cloister home key."
            )
        return found

    def take_home_key(self, key: str) -> None:
        """Use the key of another computer of this user's. Raises ConfigurationError for what can't be one."""
        if not re.fullmatch("[0-9a-f]{64}", key):
            raise ConfigurationError("That isn't a home's key.", why="It has 64 digits, 0-9 and a-f.")
        with self._locked():
            write_private(self.directory / "home.key", f"{key}\n".encode())

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Only one process at a time changes what this profile remembers."""
        path = self.directory / "lock"
        try:
            _make_private(self.directory)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise _cannot_write(path, error) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            yield
        finally:
            os.close(descriptor)


class _StoredToken(Wire):
    """A token and the address it is for: it is never sent anywhere else."""

    url: str = Field(max_length=1024)
    answer: LoginAnswer


def new(
    name: str, url: str, trust: Path | str, user: str | None = None, *, reattest_seconds: int = REATTEST_SECONDS
) -> Profile:
    """A profile that isn't saved yet. Raises ConfigurationError for a name, a URL or a user that can't be."""
    parse_url(url)
    try:
        return Profile(name=name, url=url, user=user, trust=Path(trust), reattest_seconds=reattest_seconds)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        raise ConfigurationError(
            f"This can't be a profile: its {first['loc'][0]} is wrong.",
            why=f"{first['msg']}.",
            next_step="Names hold lower-case letters, digits, '.', '_' and '-'.",
        ) from error


def home() -> Path:
    """`$CLOISTER_HOME`, or the user's configuration folder."""
    chosen = os.environ.get("CLOISTER_HOME")
    return Path(chosen).absolute() if chosen else platformdirs.user_config_path("cloister")


def names() -> list[str]:
    """The profiles on this computer, sorted."""
    try:
        return sorted(path.parent.name for path in _profiles().glob("*/profile.json"))
    except OSError:
        return []


def load(name: str) -> Profile:
    """Raises ConfigurationError where there is no such profile or it can't be read."""
    known = names()
    if name not in known:
        raise ConfigurationError(
            f"There is no cloister called {name!r} on this computer.",
            why=f"Known are: {', '.join(known)}." if known else "None was connected yet.",
            next_step=f"Connect first: {CONNECT}.",
        )
    profile = read_wire(_profiles() / name / "profile.json", Profile)
    if profile is None or profile.name != name:
        raise ConfigurationError(
            f"The profile {name!r} is damaged.", next_step=f"Connect again: {CONNECT} --name {name}."
        )
    return profile


def _profiles() -> Path:
    return home() / "profiles"


def _wrong_url(url: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{url[:200]!r} isn't a cloister's address.",
        why=why,
        next_step="Write it as https://host or https://host:port.",
    )


def _cannot_write(path: Path, error: OSError) -> StorageError:
    return StorageError(
        f"{path} can't be written.",
        why=f"{error.strerror}.",
        next_step="Check the free space and the permissions of that folder, or set CLOISTER_HOME to another one.",
    )


def _make_private(directory: Path) -> None:
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)


def write_private(path: Path, content: bytes) -> None:
    """Replace `path` whole or not at all; nobody else may read it at any moment."""
    try:
        _make_private(path.parent)
        replace_whole(path, lambda file: file.write(content))
    except OSError as error:
        raise _cannot_write(path, error) from error


def read_bounded(path: Path, *, secret: bool = False, limit: int = MAX_FILE) -> bytes:
    """At most `limit` bytes. Raises ConfigurationError, also for a secret that other users may read.

    FileNotFoundError passes.
    """
    try:
        with path.open("rb") as file:
            if secret and stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o077:
                raise ConfigurationError(
                    f"{path} is open to other users of this computer.",
                    why="It holds a secret.",
                    next_step=f"Close it: chmod 600 {path}.",
                )
            content = file.read(limit + 1)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise ConfigurationError(f"{path} can't be read.", why=f"{error.strerror}.") from error
    if len(content) > limit:
        raise ConfigurationError(f"{path} is larger than {limit} bytes.")
    return content


def load_ed25519(path: Path, *, create: bool, missing: str) -> Ed25519PrivateKey:
    """A private key in PEM (PKCS 8), made where absent only if `create` says so; `missing` says where it comes from.

    Raises ConfigurationError, StorageError.
    """
    if not path.exists():
        if not create:
            raise ConfigurationError(
                f"There is no key {path}.", why=missing, next_step="Put it back from your copy of it (mode 0600)."
            )
        key = Ed25519PrivateKey.generate()
        write_private(path, key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
        return key
    try:
        loaded = load_pem_private_key(read_bounded(path, secret=True), None)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"The key {path} can't be read.", why=f"{error}.") from error
    if not isinstance(loaded, Ed25519PrivateKey):
        raise ConfigurationError(f"The key {path} isn't an Ed25519 key.")
    return loaded


def read_wire(path: Path, kind: type[W], *, secret: bool = False) -> W | None:
    """A message from a file; None where there is no such file. Raises ConfigurationError where it is damaged."""
    try:
        return kind.from_json(read_bounded(path, secret=secret))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        raise ConfigurationError(
            f"{path} is damaged.",
            why=f"{error.errors(include_url=False, include_input=False)[0]['msg']}.",
            next_step="Connect again under a new name, or remove the file if you know why it is damaged.",
        ) from error
