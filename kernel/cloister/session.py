"""The only door to a cloister: nothing secret is sent before its evidence has convinced.

fetch the certificate -> pin it -> ask for evidence with a fresh nonce -> appraise -> only then attach the token.
"""

from __future__ import annotations

import hashlib
import ssl
import threading
import time
from collections.abc import Generator
from typing import Self

import httpx
from pydantic import ValidationError

from cloister.judging import judge
from cloister.profile import CONNECT, Address, Profile, load
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
    SessionExpiredError,
    UnreachableError,
)
from cloister_data.identity import LoginAnswer, LoginRequest

ATTEST_PATH = "/.well-known/attest"
CONSISTENCY_PATH = "/.well-known/consistency"
CONNECT_TIMEOUT = 10.0
"""Seconds for the first handshake."""
EVIDENCE_TIMEOUT = httpx.Timeout(connect=10, read=30, write=10, pool=10)
"""Evidence takes milliseconds to make; a machine that isn't proven gets no patience."""


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
        client, transport: the httpx client over that channel, with the token attached, and the calls over it.
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
        self.transport = Transport(client)
        self._policy = policy
        self._bearer = _Bearer(profile.address)
        self._lock = threading.Lock()
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

    def attest_again(self) -> AttestationResult:
        """Ask for evidence over the same pinned channel once more. A refusal closes the session."""
        with self._lock:
            try:
                self.verdict, self.checkpoint, self.log_key = self._appraise()
            except AttestationRefusedError:
                self.close()
                raise
            return self.verdict

    def attach(self, token: str) -> None:
        """Send `token` with every request from now on."""
        self._bearer.token = token

    def close(self) -> None:
        """Forget the token (in this process) and close the connections."""
        self._bearer.token = None
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
            return self.transport.call("POST", CONSISTENCY_PATH, asked, ConsistencyProof).hashes
        except UnreachableError:
            raise
        except CloisterError:
            return ()

    def _ask(self, request: AttestRequest) -> bytes:
        """The evidence as it came. Sent without a token; what an unproven machine says is not shown to anybody."""
        try:
            return self.transport.raw("POST", ATTEST_PATH, request, limit=MAX_EVIDENCE_JSON, timeout=EVIDENCE_TIMEOUT)
        except (UnreachableError, AttestationRefusedError):
            raise
        except CloisterError as error:
            raise AttestationRefusedError(
                f"{self.url} shows no evidence. Nothing was sent.",
                why="It answered the request for evidence with a refusal, or with something too large.",
                next_step="Check that the address is a cloister's.",
            ) from error


class _Bearer(httpx.Auth):
    """Attaches the token to requests to the verified address, and to no other."""

    def __init__(self, address: Address) -> None:
        self.token: str | None = None
        self._address = address

    def auth_flow(self, request: httpx.Request) -> Generator[httpx.Request, httpx.Response, None]:
        url = request.url
        ours = url.scheme == "https" and (url.host, url.port or 443) == self._address
        if self.token is not None and ours:
            request.headers["authorization"] = f"Bearer {self.token}"
        yield request


def open(profile: str | Profile, *, need_token: bool = True) -> Session:
    """Verify a cloister, then connect to it.

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
        f"The cloister at {url} isn't proven. Nothing was sent.",
        why=f"Failed checks: {failed}.",
        next_step="Compare the trust file with the operator's, or ask them; don't send anything by another way.",
    )
