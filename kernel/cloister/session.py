"""The only door to a cloister: nothing secret is sent before its evidence has convinced.

fetch the certificate -> pin it -> ask for evidence with a fresh nonce -> appraise -> only then attach the token.
And again, on a timer, for as long as the session is open: see `cloister.reattest`.
"""

from __future__ import annotations

import hashlib
import os
import ssl
import threading
import time
from collections.abc import Callable, Generator
from typing import Self

import httpx
from pydantic import ValidationError

from cloister.judging import judge
from cloister.profile import CONNECT, Address, Profile, load
from cloister.reattest import Keeper, LapsedError, now
from cloister.transport import API, TIMEOUT, Transport
from cloister_attest.channel import fetch_certificate, pinned_context
from cloister_attest.evidence import MAX_EVIDENCE_JSON, AttestRequest, Evidence
from cloister_attest.policy import AttestationPolicy
from cloister_attest.result import AttestationResult
from cloister_data.checkpoint import Checkpoint, verify_checkpoint
from cloister_data.consistency import ConsistencyProof, ConsistencyRequest
from cloister_data.errors import (
    AttestationRefusedError,
    AuthenticationError,
    CloisterError,
    ConfigurationError,
    SessionExpiredError,
    StorageError,
    TooManyRequestsError,
    UnavailableError,
    UnreachableError,
)
from cloister_data.identity import LoginAnswer, LoginRequest

ATTEST_PATH = "/.well-known/attest"
CONSISTENCY_PATH = "/.well-known/consistency"
NOTHING = "Nothing was sent."
"""What the errors of a first appraisal say; those of a later one say what is true then."""
CONNECT_TIMEOUT = 10.0
"""Seconds for the first handshake."""
EVIDENCE_TIMEOUT = httpx.Timeout(connect=10, read=30, write=10, pool=10)
"""Evidence takes milliseconds to make; a machine that isn't proven gets no patience."""
_BUSY = (UnavailableError, TooManyRequestsError, StorageError)
"""What passes by itself: an outage, which proves nothing, and refuses nothing."""
_LEAVING = frozenset(["http11.send_request_headers.started", "http11.send_request_body.started"])
"""httpcore's names of the steps before anything of a request is sent."""


class Session:
    """A verified channel to one cloister. Made by `open` alone. May be used from several threads at once.

    Attributes:
        profile, url: which cloister.
        verdict: what the appraisal came to; it is `ok`, or there would be no session.
        certificate: the pinned certificate, DER.
        checkpoint, log_key: the audit log's state at the last appraisal, and the key (32 bytes) that signs for it;
            `verdict.checkpoint` is the signed note.
        ssl_context: trusts that certificate alone. Give it to websockets too, with `proxy=None`: by default that
            library sends its handshake, which holds the token, through the proxies that the environment names.
        client, transport: the httpx client over that channel, with the token attached, and the calls over it. Nothing
            leaves by either, but questions for evidence, while there is a `doubt`.
    """

    def __init__(
        self,
        profile: Profile,
        policy: AttestationPolicy,
        certificate: bytes,
        context: ssl.SSLContext,
        client: httpx.Client,
    ) -> None:
        self.profile = profile
        self.certificate = certificate
        self.ssl_context = context
        self.client = client
        self.transport = Transport(client, self._prove)
        self._policy = policy
        self._bare = Transport(client)
        self._bearer = _Bearer(profile.address, lambda: self.doubt)
        self._lock = threading.Lock()
        self._ended: CloisterError | None = None
        self._pid = os.getpid()
        self._listeners: dict[object, Callable[[], None]] = {}
        self._keeper = Keeper(self.attest_again, profile.reattest_seconds)
        self.verdict, self.checkpoint, self.log_key = self._appraise()
        client.auth = self._bearer

    @property
    def url(self) -> str:
        return self.profile.url

    @property
    def certificate_digest(self) -> str:
        """SHA-256 of the certificate in hex, as `AttestationEvent` names it."""
        return hashlib.sha256(self.certificate).hexdigest()

    @property
    def token(self) -> str | None:
        """The bearer token, or None where nobody is signed in."""
        return self._bearer.token

    def websocket_url(self, path: str) -> str:
        """`wss://...` for a path below `/api/v1`. Connect with `ssl=ssl_context` and `proxy=None`."""
        route = path if path.startswith(f"{API}/") else API + path
        return f"wss://{self.profile.address.authority}{route}"

    def start(self) -> None:
        """Begin to ask for evidence on a timer. Called by `open`."""
        self._keeper.start()

    @property
    def doubt(self) -> CloisterError | None:
        """Why nothing may be sent now; None while the machine is proven.

        An AttestationRefusedError or UnreachableError where the session has ended, LapsedError where the last proof is
        too old, ConfigurationError in a forked process. A new error each time, to be raised.
        """
        if self._forked:
            return ConfigurationError(
                "This process was forked from one that was connected.",
                why="Two processes that share one encrypted connection would make it readable.",
                next_step="Open a session here too.",
            )
        if self._ended is not None:
            return _anew(self._ended)
        if self.proof_left > 0:
            return None
        return LapsedError(
            f"The cloister at {self.url} hasn't proven itself for too long. Nothing more is sent to it.",
            why=f"No evidence was to be had for {self._keeper.bound:.0f} seconds.",
            next_step="It is asked again, and work goes on when it answers. Check that it is running, and the network.",
        )

    @property
    def _forked(self) -> bool:
        return self._pid != os.getpid()

    @property
    def proof_left(self) -> float:
        """Seconds for which the last proof still counts."""
        return self._keeper.left

    def when_ended(self, listener: Callable[[], None]) -> Callable[[], None]:
        """Call `listener`, in any thread, when this session is refused or closed. Returns what takes that back."""
        key = object()
        self._listeners[key] = listener
        if self._ended is not None:
            listener()

        def forget() -> None:
            self._listeners.pop(key, None)

        return forget

    def attest_again(self) -> AttestationResult:
        """Ask for evidence over the same pinned channel once more; the session's timer does that too.

        Raises AttestationRefusedError, and the session is closed then; UnreachableError, and nothing has changed.
        """
        if self._forked and (doubt := self.doubt) is not None:
            raise doubt
        with self._lock:
            return self._attest()

    def _attest(self) -> AttestationResult:
        if self._ended is not None:
            raise _anew(self._ended)
        asked = now()
        try:
            self.verdict, self.checkpoint, self.log_key = self._appraise()
        except AttestationRefusedError as error:
            refusal = _anew(error, error.what.replace(NOTHING, "Nothing more is sent to it."))
            self._end(refusal)
            raise refusal from error
        self._keeper.proven(asked)
        return self.verdict

    def _prove(self) -> None:
        """Before each request: where the last proof is too old, for a new one. Raises as `attest_again` does."""
        if (doubt := self.doubt) is None:
            return
        if self._forked:
            raise doubt
        if not self._lock.acquire(timeout=CONNECT_TIMEOUT):
            raise self.doubt or LapsedError("The cloister's evidence is being asked for.", next_step="Try again.")
        try:
            if self._ended is not None or self.proof_left <= 0:
                self._attest()
        finally:
            self._lock.release()

    def attach(self, token: str) -> None:
        """Send `token` with every request from now on."""
        self._bearer.token = token

    def close(self) -> None:
        """Forget the token (in this process), stop the timer, and close the connections."""
        self._end(
            UnreachableError(
                "The connection to the cloister is closed.",
                why="Its session was closed.",
                next_step="Open a new session: it verifies the evidence again.",
            ),
            # Closing the client under a request that has just begun would leave its connection open.
            patience=2.0,
        )

    def _end(self, error: CloisterError, patience: float = 0.0) -> None:
        if self._ended is None:
            self._ended = error
        self._bearer.token = None
        for listener in list(self._listeners.values()):
            listener()
        self._keeper.stop(patience)
        if not self._forked:
            self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _appraise(self) -> tuple[AttestationResult, Checkpoint, bytes]:
        # Read before asking: another session may remember a newer checkpoint while this one is under way.
        known = self.profile.remembered()
        request = AttestRequest.fresh()
        answer = self._ask(request)
        verdict = judge(answer, self._policy, certificate=self.certificate, nonce=request.nonce, at=int(time.time()))
        if not verdict.ok:
            raise _refused(self.url, verdict)
        evidence = Evidence.from_json(answer)
        checkpoint = verify_checkpoint(evidence.checkpoint, evidence.log_key)
        if known is not None:
            known.refuse_rollback(checkpoint, self._consistency(known.size, checkpoint.size))
        self.profile.remember(checkpoint, evidence.log_key)
        return verdict, checkpoint, evidence.log_key

    def _consistency(self, first: int, second: int) -> tuple[bytes, ...]:
        """What the machine, which is proven by now, shows for its log of `second` entries extending that of `first`."""
        if not 0 < first < second:
            return ()
        asked = ConsistencyRequest(first=first, second=second)
        try:
            return self._bare.call("POST", CONSISTENCY_PATH, asked, ConsistencyProof).hashes
        except UnreachableError:
            raise
        except _BUSY as error:
            raise UnreachableError(
                f"{self.url} can't show at the moment that its audit log only grew. {NOTHING}",
                why="It says that it is busy.",
                next_step="Try again in a while.",
            ) from error
        except CloisterError:
            return ()

    def _ask(self, request: AttestRequest) -> bytes:
        """The evidence as it came. Sent without a token; what an unproven machine says is not shown to anybody."""
        try:
            return self._bare.raw("POST", ATTEST_PATH, request, limit=MAX_EVIDENCE_JSON, timeout=EVIDENCE_TIMEOUT)
        except (UnreachableError, AttestationRefusedError):
            raise
        except _BUSY as error:
            raise UnreachableError(
                f"{self.url} shows no evidence at the moment. {NOTHING}",
                why="It says that it is busy.",
                next_step="Try again in a while.",
            ) from error
        except CloisterError as error:
            raise AttestationRefusedError(
                f"{self.url} shows no evidence. {NOTHING}",
                why="It answered the request for evidence with a refusal, or with something too large.",
                next_step="Check that the address is a cloister's.",
            ) from error


class _Bearer(httpx.Auth):
    """Attaches the token to requests to the verified address alone, and stops all of them while there is a doubt.

    What asks for evidence goes anyway, without it: the answer may be that the machine isn't worth it any more.
    """

    def __init__(self, address: Address, doubt: Callable[[], CloisterError | None]) -> None:
        self.token: str | None = None
        self._address, self._doubt = address, doubt

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        url = request.url
        if not url.path.startswith("/.well-known/"):
            self._refuse_doubt()
            # Once more when there is a connection: who delays its handshake would delay the request past a refusal.
            request.extensions["trace"] = self._trace
            token = self.token
            if token is not None and url.scheme == "https" and (url.host, url.port or 443) == self._address:
                request.headers["authorization"] = f"Bearer {token}"
        yield request

    def _trace(self, event: str, _: object) -> None:
        """Called by httpcore at each step of a request."""
        if event in _LEAVING:
            self._refuse_doubt()

    def _refuse_doubt(self) -> None:
        if (doubt := self._doubt()) is not None:
            raise doubt


def open(profile: str | Profile, *, need_token: bool = True) -> Session:
    """Verify a cloister, then connect to it. It is verified again on a timer until the session is closed.

    Raises:
        ConfigurationError: no such profile, or its trust file is wrong.
        UnreachableError: nobody answers.
        AttestationRefusedError: the evidence doesn't hold; the failed checks are in the message. Nothing was sent.
        SessionExpiredError: `need_token`, and there is no token or it has expired.
    """
    known = load(profile) if isinstance(profile, str) else profile
    policy = known.policy()
    address = known.address
    certificate = fetch_certificate(address.host, address.port, CONNECT_TIMEOUT)
    context = pinned_context(certificate)
    client = httpx.Client(
        base_url=f"https://{address.authority}",
        verify=context,
        trust_env=False,
        follow_redirects=False,
        timeout=TIMEOUT,
    )
    try:
        session = Session(known, policy, certificate, context, client)
        stored = known.token()
        if stored is not None and stored.expires > time.time():
            session.attach(stored.token)
        elif need_token:
            raise SessionExpiredError(
                f"Nobody is signed in at {known.url}." if stored is None else f"Your session at {known.url} has ended.",
                why="There is no token on this computer." if stored is None else "Its time is over.",
                next_step=f"Sign in: {CONNECT} --name {known.name}.",
            )
        session.start()
        return session
    except BaseException:
        client.close()
        raise


def login(session: Session, user: str, password: str) -> LoginAnswer:
    """Sign in over a verified session, attach the token, and store it in the profile.

    Raises AuthenticationError (which doesn't tell whether the name exists), TooManyRequestsError.
    """
    try:
        request = LoginRequest(user=user, password=password)
    except ValidationError:
        # Not chained: pydantic's error would carry the password into a traceback.
        raise AuthenticationError(
            "The name or the password is wrong.",
            why="Names are lower-case letters, digits, '.', '_' and '-'; a password is never empty.",
            next_step="Check both.",
        ) from None
    answer = session.transport.call("POST", "/login", request, LoginAnswer)
    session.profile.store_token(answer)
    session.attach(answer.token)
    return answer


def _refused(url: str, verdict: AttestationResult) -> AttestationRefusedError:
    failed = "; ".join(f"{check.name}: {check.reason}" for check in verdict.failed) or "checks are missing"
    return AttestationRefusedError(
        f"The cloister at {url} isn't proven. {NOTHING}",
        why=f"Failed checks: {failed}.",
        next_step="Compare the trust file with the operator's, or ask them; don't send anything by another way.",
    )


def _anew(error: CloisterError, what: str | None = None) -> CloisterError:
    """The same error without the traceback of where it was raised before."""
    return type(error)(error.what if what is None else what, why=error.why, next_step=error.next_step)
