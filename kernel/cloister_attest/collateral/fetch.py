"""Getting collateral from the makers' public services, or from an organisation's own mirror of them.

Nothing secret is sent: the addresses name a chip or a platform. Nothing that comes back is believed.
"""

from __future__ import annotations

import ipaddress
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

import httpx

from cloister_attest.collateral.items import MAX_CHAIN, MAX_CONTENT, Item
from cloister_attest.collateral.needs import KDS, Need
from cloister_attest.collateral.offline import identify
from cloister_attest.outcome import EvidenceError
from cloister_attest.tdx.collateral import MAX_DOCUMENT, PCS_ROOT_CRL
from cloister_data.errors import (
    CloisterError,
    ConfigurationError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnreachableError,
)

PCS = "https://api.trustedservices.intel.com"
PCCS_ROOT_CRL = "/sgx/certification/v4/rootcacrl"
"""Where Intel's caching service (PCCS) hands out the root's list, in hex."""

ISSUER_CHAIN = {
    "intel-tcb-info": "TCB-Info-Issuer-Chain",
    "intel-qe-identity": "SGX-Enclave-Identity-Issuer-Chain",
}
"""The header that holds a document's signing chain, PEM in URL encoding."""

TIMEOUT = httpx.Timeout(connect=10, read=20, write=10, pool=10)
DEADLINE = 60.0
"""Seconds for one document."""
MAX_REDIRECTS = 3
MAX_CERTIFICATES = 64 << 10
MAX_AMD_CRL = 1 << 20

_LOOPBACK = ("all://127.0.0.1", "all://[::1]", "all://localhost")


@dataclass(frozen=True)
class Hosts:
    """Who is asked. Raises ConfigurationError for an address that isn't https; http only reaches this computer.

    Attributes:
        amd, intel: what stands before the path of AMD's and of Intel's addresses.
        intel_root: the whole address of the list of Intel's root, which Intel keeps on another host.
    """

    amd: str = KDS
    intel: str = PCS
    intel_root: str = PCS_ROOT_CRL

    def __post_init__(self) -> None:
        for url in (self.amd, self.intel, self.intel_root):
            _check(url)

    @classmethod
    def mirrored(cls, amd: str | None, intel: str | None, intel_root: str | None = None) -> Hosts:
        """The public services, but for those that a mirror stands for. An `intel` mirror is a PCCS."""
        base = None if intel is None else intel.rstrip("/")
        root = intel_root or (PCS_ROOT_CRL if base is None else base + PCCS_ROOT_CRL)
        return cls(KDS if amd is None else amd.rstrip("/"), base or PCS, root)

    def url(self, need: Need) -> str:
        """Where to ask for `need`."""
        if need.kind == "intel-root-crl":
            return self.intel_root
        public, asked = (KDS, self.amd) if need.kind.startswith("amd-") else (PCS, self.intel)
        return asked + need.url.removeprefix(public)


def open_client() -> httpx.Client:
    """A client for `fetch`, which goes through the proxies that the environment names, but for this computer."""
    return httpx.Client(timeout=TIMEOUT, follow_redirects=False, mounts=dict.fromkeys(_LOOPBACK))


def fetch(need: Need, client: httpx.Client, hosts: Hosts) -> tuple[Item, ...]:
    """The items of `need.pieces`, as the service answers them.

    Raises UnreachableError, NotFoundError, TooManyRequestsError, TooLargeError, or CloisterError for an answer that
    isn't what was asked for; each says what couldn't be fetched, from where, and what to do.
    """
    url = hosts.url(need)
    content, issuers = _get(need, client, url)
    try:
        found = {(item.kind, item.name): item for item in identify(content, issuers)}
    except EvidenceError as error:
        raise _failed(CloisterError, need, url, f"The answer can't be used: {error}.") from error
    missing = [piece for piece in need.pieces if piece not in found]
    if missing:
        raise _failed(
            CloisterError,
            need,
            url,
            f"The answer holds no {missing[0].kind} of the name {missing[0].name}.",
            "Check the address of the mirror, where one was named.",
        )
    return tuple(found[piece] for piece in need.pieces)


def _get(need: Need, client: httpx.Client, url: str) -> tuple[bytes, tuple[bytes, ...]]:
    """The answer, and the signing chain in its headers."""
    until = time.monotonic() + DEADLINE
    asked = httpx.URL(url)
    with _reachable(need, url):
        for _ in range(MAX_REDIRECTS + 1):
            with client.stream(
                "GET", asked, headers={"accept-encoding": "identity"}, timeout=TIMEOUT, follow_redirects=False
            ) as response:
                if response.is_redirect:
                    asked = _redirected(need, url, asked, response.headers.get("location", ""))
                    continue
                if not response.is_success:
                    raise _refused(need, url, response)
                header = response.headers.get(ISSUER_CHAIN.get(need.kind, ""), "")
                if len(header) > 3 * MAX_CHAIN:
                    raise _failed(TooLargeError, need, url, "The signing chain in its header is too large.")
                issuers = (unquote_to_bytes(header),) if header else ()
                return _read(need, url, response, until), issuers
    raise _failed(CloisterError, need, url, "It redirects without an end.")


def _read(need: Need, url: str, response: httpx.Response, until: float) -> bytes:
    if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
        raise _failed(CloisterError, need, url, "The answer is compressed, which wasn't asked for.")
    limit = _limit(need)
    parts, size = [], 0
    for part in response.iter_raw():
        size += len(part)
        if size > limit:
            raise _failed(TooLargeError, need, url, f"The answer has more than {limit} bytes.")
        if time.monotonic() > until:
            raise _failed(UnreachableError, need, url, f"The answer took longer than {DEADLINE:.0f} seconds.")
        parts.append(part)
    return b"".join(parts)


def _limit(need: Need) -> int:
    if need.kind in ISSUER_CHAIN:
        return MAX_DOCUMENT
    if need.kind in ("intel-root-crl", "intel-pck-crl"):
        # A mirror may write it in hex.
        return MAX_CONTENT
    return MAX_AMD_CRL if need.kind == "amd-crl" else MAX_CERTIFICATES


def _redirected(need: Need, url: str, asked: httpx.URL, location: str) -> httpx.URL:
    """The next address, on the same host. Raises CloisterError for any other."""
    try:
        target = asked.join(location)
    except (httpx.InvalidURL, ValueError) as error:
        raise _failed(CloisterError, need, url, "It redirects to an address that can't be read.") from error
    if not location or (target.scheme, target.host, target.port) != (asked.scheme, asked.host, asked.port):
        raise _failed(
            CloisterError,
            need,
            url,
            "It redirects to another host, which wasn't asked.",
            "A proxy that wants a login also has this effect. Name a mirror with --amd or --intel, or supply the "
            "file with --from.",
        )
    return target


def _refused(need: Need, url: str, response: httpx.Response) -> CloisterError:
    status = response.status_code
    if status == 429:
        after = response.headers.get("retry-after", "")
        wait = f"Wait {after} seconds" if after.isdecimal() and len(after) < 6 else "Wait a minute"
        return _failed(
            TooManyRequestsError,
            need,
            url,
            "The service limits how often it may be asked (HTTP status 429).",
            f"{wait}, then run the command again: what was fetched is kept.",
        )
    if status in (400, 404):
        return _failed(NotFoundError, need, url, f"The service doesn't know it (HTTP status {status}).", _unknown(need))
    if status >= 500:
        return _failed(UnreachableError, need, url, f"The service has a fault (HTTP status {status}).")
    return _failed(CloisterError, need, url, f"The service refuses (HTTP status {status}).")


def _unknown(need: Need) -> str:
    if need.kind == "amd-vcek":
        return (
            "Check that the machine is a genuine one: AMD has no certificate for this chip at this firmware, or the "
            "product is another (--product)."
        )
    return "Check the address of the mirror, where one was named; the platform may be too new or too old for it."


@contextmanager
def _reachable(need: Need, url: str) -> Iterator[None]:
    try:
        yield
    except httpx.HTTPError as error:
        raise _failed(UnreachableError, need, url, f"{str(error).rstrip('.') or type(error).__name__}.") from error


def _failed(kind: type[CloisterError], need: Need, url: str, why: str, next_step: str = "") -> CloisterError:
    return kind(
        f"The {need.what} couldn't be fetched from {url}.",
        why=why,
        next_step=next_step
        or "Try again later; or fetch it with curl on another machine, and supply the file: --from FILE.",
    )


def _check(url: str) -> None:
    try:
        parsed = httpx.URL(url)
    except (httpx.InvalidURL, TypeError) as error:
        raise _wrong(url, "It can't be read.") from error
    if parsed.userinfo or parsed.query or parsed.fragment:
        raise _wrong(url, "It holds a password, a query or a fragment.")
    if not parsed.host or (parsed.scheme != "https" and not (parsed.scheme == "http" and _is_loopback(parsed.host))):
        raise _wrong(url, "It must begin with https://; http:// is for this computer alone.")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _wrong(url: str, why: str) -> ConfigurationError:
    return ConfigurationError(
        f"{url[:200]!r} isn't the address of a collateral service.",
        why=why,
        next_step="Write it as https://host[:port][/path].",
    )
