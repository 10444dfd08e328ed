"""Users, passwords and tokens. A caller is known by a token over HTTPS, or by the kernel's socket."""

from __future__ import annotations

import hashlib
import secrets
import threading
import time
from collections import OrderedDict
from dataclasses import dataclass
from typing import get_args

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError
from sqlalchemy import delete, func, select
from sqlalchemy.orm import Session

from cloister_budget.clock import steady_time
from cloister_budget.database import Database
from cloister_budget.entries import Login, UserCreated
from cloister_budget.journal import Journal
from cloister_budget.tables import Token, User
from cloister_data.errors import (
    AuthenticationError,
    ConflictError,
    ForbiddenError,
    SessionExpiredError,
    TooManyRequestsError,
)
from cloister_data.identity import LoginAnswer, LoginRequest, NewUser, Role, UserList, UserView
from cloister_data.policy import Sandbox
from cloister_guard.counts import Counts

TOKEN_SECONDS = 12 * 3600
ATTEMPTS = 10
ATTEMPT_WINDOW_SECONDS = 60.0
REMEMBERED_NAMES = 10_000


@dataclass(frozen=True)
class Caller:
    """Who asks. `sandbox` is how the caller's kernel is kept apart, or None for a laptop."""

    user: str
    role: Role
    sandbox: Sandbox | None = None
    token_hash: str | None = None

    def require(self, *roles: Role) -> None:
        """Raises ForbiddenError unless the caller has one of `roles`."""
        if self.role not in roles:
            raise ForbiddenError(
                f"This needs the role {' or '.join(roles)}.",
                why=f"You are signed in as {self.user}, a {self.role}.",
                next_step="Sign in as another user: cloister connect URL --trust FILE --user NAME.",
            )


class _Attempts:
    """Counts recent attempts by name, known or not, so that the count tells nobody which names exist."""

    def __init__(self) -> None:
        self._seen: OrderedDict[str, list[float]] = OrderedDict()
        self._lock = threading.Lock()

    def admit(self, name: str) -> None:
        now = time.monotonic()
        with self._lock:
            recent = [at for at in self._seen.pop(name, []) if now - at < ATTEMPT_WINDOW_SECONDS]
            self._seen[name] = [*recent, now]
            while len(self._seen) > REMEMBERED_NAMES:
                self._seen.popitem(last=False)
        if len(recent) >= ATTEMPTS:
            raise TooManyRequestsError(
                "Too many sign-in attempts for this name.",
                why=f"At most {ATTEMPTS} are taken in {ATTEMPT_WINDOW_SECONDS:.0f} seconds.",
                next_step="Wait a minute, then try again.",
            )


def hash_password(password: str) -> str:
    """argon2id in its PHC string form, RFC 9106's second recommended parameters (64 MiB, 3 passes)."""
    return PasswordHasher().hash(password)


class Identity:
    """The users of one cloister."""

    def __init__(self, database: Database, journal: Journal, counts: Counts) -> None:
        self._database = database
        self._journal = journal
        self._counts = counts
        self._hasher = PasswordHasher()
        self._attempts = _Attempts()
        # Verified for names that don't exist, so that both answers take the same time.
        self._decoy = self._hasher.hash(secrets.token_hex(16))

    def bootstrap(self, admin: str, password_hash: str) -> None:
        """Create the first admin if there is no user yet."""
        with self._database.write() as session:
            if session.scalar(select(func.count()).select_from(User)):
                return
            self._add(session, admin, "admin", password_hash)

    def create(self, new: NewUser) -> UserView:
        """Raises ConflictError where the name is taken."""
        password_hash = hash_password(new.password)
        with self._database.write() as session:
            if session.get(User, new.user) is not None:
                raise ConflictError(f"There is a user {new.user!r} already.", next_step="Choose another name.")
            return self._add(session, new.user, new.role, password_hash)

    def _add(self, session: Session, name: str, role: Role, password_hash: str) -> UserView:
        created = int(steady_time())
        session.add(User(name=name, role=role, password_hash=password_hash, created=created))
        self._journal.append(session, UserCreated(user=self._journal.ref(session, "user", name), role=role))
        return UserView(user=name, role=role, created=created)

    def users(self) -> UserList:
        with self._database.read() as session:
            rows = session.scalars(select(User).order_by(User.name)).all()
            return UserList(users=tuple(UserView(user=r.name, role=_role(r.role), created=r.created) for r in rows))

    def login(self, request: LoginRequest) -> LoginAnswer:
        """A token for the right password. Raises AuthenticationError, which doesn't tell whether the name exists."""
        try:
            self._attempts.admit(request.user)
        except TooManyRequestsError:
            self._counts.sign_in_refused()
            raise
        with self._database.read() as session:
            row = session.get(User, request.user)
            role = row.role if row else "scientist"
            stored = row.password_hash if row else self._decoy
        try:
            self._hasher.verify(stored, request.password)
        except (VerificationError, InvalidHashError):
            row = None
        if row is None:
            self._counts.sign_in_refused()
            raise AuthenticationError(
                "The name or the password is wrong.",
                why="The cloister doesn't tell which of the two.",
                next_step="Check both; an admin can create users with `cloister user add`.",
            )
        token = secrets.token_urlsafe(32)
        now = int(steady_time())
        with self._database.write() as session:
            session.execute(delete(Token).where(Token.expires < now))
            session.add(Token(hash=_token_hash(token), user=request.user, created=now, expires=now + TOKEN_SECONDS))
            self._journal.append(session, Login(user=self._journal.ref(session, "user", request.user)))
        return LoginAnswer(token=token, user=request.user, role=_role(role), expires=now + TOKEN_SECONDS)

    def logout(self, caller: Caller) -> None:
        with self._database.write() as session:
            session.execute(delete(Token).where(Token.hash == caller.token_hash))

    def authenticate(self, token: str) -> Caller:
        """The caller behind a bearer token. Raises SessionExpiredError."""
        digest = _token_hash(token)
        with self._database.read() as session:
            row = session.get(Token, digest)
            if row is not None and row.expires > steady_time():
                user = session.get(User, row.user)
                if user is not None:
                    return Caller(user.name, _role(user.role), token_hash=digest)
        self._counts.token_refused()
        raise SessionExpiredError(
            "You are not signed in, or your session has ended.",
            why=f"Sessions end after {TOKEN_SECONDS // 3600} hours.",
            next_step="Sign in again: cloister connect URL --trust FILE.",
        )

    def signed_in(self, caller: Caller) -> bool:
        """Whether the caller's session still holds; a kernel's caller has none and is there as long as its socket."""
        if caller.token_hash is None:
            return True
        with self._database.read() as session:
            row = session.get(Token, caller.token_hash)
            return row is not None and row.expires > time.time()

    def scientist(self, user: str, sandbox: Sandbox) -> Caller:
        """The caller behind a kernel's socket: a scientist, whatever else the user may be."""
        return Caller(user, "scientist", sandbox)


def _role(stored: str) -> Role:
    if stored not in get_args(Role):
        raise ForbiddenError("This user has a role that this version doesn't know.")
    return stored  # type: ignore[return-value]


def _token_hash(token: str) -> str:
    """Tokens are 256 random bits, so one SHA-256 is enough to store them by."""
    return hashlib.sha256(token.encode()).hexdigest()
