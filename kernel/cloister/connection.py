"""Which cloister a notebook or a script talks to: the kernel's own socket, or a profile of this laptop."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeVar

from cloister_data.base import Wire
from cloister_data.errors import ConfigurationError

if TYPE_CHECKING:
    from cloister.profile import Profile
    from cloister.session import Session
    from cloister.transport import Transport

T = TypeVar("T")
W = TypeVar("W", bound=Wire)

SOCKET_VARIABLE = "CLOISTER_GUARD_SOCKET"
"""Set by the cloister in its kernels: the path of the kernel's guard socket."""


class Caller(Protocol):
    """What the SDK needs of a transport; `cloister.transport.Transport` is one."""

    def call(
        self,
        method: str,
        path: str,
        send: Wire | bytes | None = None,
        receive: type[W] | None = None,
        content_type: str | None = None,
    ) -> W: ...

    def raw(
        self, method: str, path: str, send: Wire | bytes | None = None, content_type: str | None = None
    ) -> bytes: ...


class _Laptop:
    """Calls over the session in use. Where the cloister shows another certificate, as it does after a restart, it is
    appraised from scratch, before the call is made again: the first time nothing of it was sent.
    """

    def __init__(self, session: Session) -> None:
        self._opened = session
        self._renewing = threading.Lock()

    def call(
        self,
        method: str,
        path: str,
        send: Wire | bytes | None = None,
        receive: type[W] | None = None,
        content_type: str | None = None,
    ) -> W:
        return self._over(lambda found: found.call(method, path, send, receive, content_type))

    def raw(self, method: str, path: str, send: Wire | bytes | None = None, content_type: str | None = None) -> bytes:
        return self._over(lambda found: found.raw(method, path, send, content_type))

    def _over(self, make: Callable[[Transport], T]) -> T:
        from cloister.transport import CertificateChangedError

        opened = self._opened
        try:
            return make(opened.transport)
        except CertificateChangedError:
            return make(self._renewed(opened).transport)

    def _renewed(self, old: Session) -> Session:
        """Raises what `cloister.session.open` raises; the next call tries again."""
        from cloister.session import open as open_session

        global _session
        with self._renewing:
            if self._opened is old:
                opened = open_session(old.profile)
                with _lock:
                    # Else another one was chosen meanwhile, or none.
                    if chosen := _session is old:
                        self._opened = _session = opened
                (old if chosen else opened).close()
            return self._opened


_lock = threading.Lock()
_caller: Caller | None = None
_caller_pid: int | None = None
_session: Session | None = None


def use(profile: str | Profile) -> Session:
    """Work with the cloister of `profile` from here on, after its evidence has been verified.

    It is verified again from time to time, and before anything is sent after a restart of the cloister. Where it no
    longer convinces, every call raises AttestationRefusedError, until `use` finds it proven again.

    For laptops; in a cloister's kernel nothing has to be chosen. Raises what `cloister.session.open` raises.
    """
    from cloister.session import open as open_session

    global _caller, _caller_pid, _session
    opened = open_session(profile)
    with _lock:
        previous, _session = _session, opened
        _caller, _caller_pid = _Laptop(opened), os.getpid()
    if previous is not None:
        previous.close()
    return opened


def current() -> Caller:
    """The transport in use. Raises ConfigurationError where none was chosen."""
    global _caller, _caller_pid, _session
    with _lock:
        if _caller is not None and _caller_pid == os.getpid():
            return _caller
        if _caller is not None and _session is not None:
            # After a fork the parent's TLS connection can't be shared.
            _caller = _session = None
            raise ConfigurationError(
                "This process was forked from one that was connected.",
                why="A verified connection can't be shared by two processes.",
                next_step="Call cloister.use(NAME) here too.",
            )
        path = os.environ.get(SOCKET_VARIABLE)
        if path:
            from cloister.transport import Transport

            _caller, _caller_pid = Transport.unix(path), os.getpid()
            return _caller
    from cloister.profile import CONNECT, names

    known = names()
    if not known:
        raise ConfigurationError(
            "No cloister is connected.",
            why="This isn't a cloister's kernel, and no cloister is known on this computer.",
            next_step=f"Run in a terminal: {CONNECT}; then cloister.use(NAME).",
        )
    raise ConfigurationError(
        "No cloister was chosen.",
        why=f"This isn't a cloister's kernel. Known on this computer: {', '.join(known)}.",
        next_step=f"Pick a cloister's kernel in JupyterLab, or call cloister.use({known[0]!r}).",
    )


def current_session() -> Session | None:
    """The laptop's session, or None in a cloister's kernel and where nothing was chosen."""
    return _session


def forget() -> None:
    """Close the connection in use, if any; the next call connects anew."""
    global _caller, _caller_pid, _session
    with _lock:
        opened, caller, ours = _session, _caller, _caller_pid == os.getpid()
        _caller = _caller_pid = _session = None
    if opened is not None and ours:
        opened.close()
    elif caller is not None and ours:
        close = getattr(caller, "close", None)
        if close is not None:
            close()
