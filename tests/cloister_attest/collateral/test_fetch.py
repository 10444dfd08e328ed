"""The makers' services, played on this computer: what is asked, what is taken, and every way in which it goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from cloister_attest.collateral import fetch as fetching
from cloister_attest.collateral.fetch import Hosts, fetch, open_client
from cloister_attest.collateral.items import Item
from cloister_attest.collateral.needs import Need, needs_of_snp, needs_of_tdx
from cloister_data.errors import (
    CloisterError,
    ConfigurationError,
    NotFoundError,
    TooLargeError,
    TooManyRequestsError,
    UnreachableError,
)
from tests.cloister_attest.collateral.pieces import as_pem, snp, snp_items, tdx_items
from tests.cloister_attest.tdx import minting as intel
from tests.fakes.publishers import Answer, Publishers, issuer_chain, publishers

VCEK = f"/vcek/v1/Genoa/{'63' * 64}?blSPL=4&teeSPL=1&snpSPL=24&ucodeSPL=219"
TCB = "/tdx/certification/v4/tcb?fmspc=90c06f000000"
QE = "/tdx/certification/v4/qe/identity"
PCK_CRL = "/sgx/certification/v4/pckcrl?ca=platform&encoding=der"
ROOT_CRL = "/sgx/certification/v4/rootcacrl"
CHAIN = issuer_chain(intel.pem(intel.TCB_SIGNER, intel.ROOT))


@pytest.fixture
def served() -> Iterator[Publishers]:
    with publishers() as found:
        yield found


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    with open_client() as found:
        yield found


def hosts(served: Publishers) -> Hosts:
    return Hosts.mirrored(served.url, served.url)


def need(kind: str) -> Need:
    return next(each for each in (*needs_of_snp(snp().report, ()), *needs_of_tdx(intel.quote())) if each.kind == kind)


def test_the_public_services_are_asked_by_default() -> None:
    for each in (*needs_of_snp(snp().report, ()), *needs_of_tdx(intel.quote())):
        assert Hosts().url(each) == Hosts.mirrored(None, None).url(each) == each.url
    mirror = Hosts.mirrored("https://kds.example/amd/", "https://pccs.example:8081")
    assert mirror.url(need("amd-crl")) == "https://kds.example/amd/vcek/v1/Genoa/crl"
    assert mirror.url(need("intel-tcb-info")) == f"https://pccs.example:8081{TCB}"
    assert mirror.url(need("intel-root-crl")) == f"https://pccs.example:8081{ROOT_CRL}"
    assert Hosts.mirrored(None, "https://p.example", "https://r.example/r.der").intel_root == "https://r.example/r.der"


@pytest.mark.parametrize(
    "url",
    ["http://kds.example", "ftp://127.0.0.1", "kds.example", "https://", "https://u:p@kds.example",
     "https://kds.example/?x", "https://kds.example/#x", "http://127.0.0.1.example.org", "https://[::1"],
)  # fmt: skip
def test_a_service_is_reached_over_https_or_on_this_computer(url: str) -> None:
    with pytest.raises(ConfigurationError, match="isn't the address of a collateral service"):
        Hosts(amd=url)


def test_amd_s_pieces_come_from_their_addresses(served: Publishers, client: httpx.Client) -> None:
    vcek, ask, ark, crl = snp_items()
    served.publish(VCEK, vcek.content)
    served.publish("/vcek/v1/Genoa/cert_chain", as_pem(ask.content, ark.content))
    served.publish("/vcek/v1/Genoa/crl", crl.content)
    found: list[Item] = []
    for each in needs_of_snp(snp().report, ()):
        found.extend(fetch(each, client, hosts(served)))
    assert tuple(found) == snp_items()
    assert served.asked == [VCEK, "/vcek/v1/Genoa/cert_chain", "/vcek/v1/Genoa/crl"]


def test_intel_s_pieces_come_with_the_chain_of_their_header(served: Publishers, client: httpx.Client) -> None:
    root, pck, tcb, qe = tdx_items()
    served.publish(TCB, tcb.content, TCB_Info_Issuer_Chain=CHAIN)
    served.publish(QE, qe.content, SGX_Enclave_Identity_Issuer_Chain=CHAIN)
    served.publish(PCK_CRL, pck.content)
    served.publish(ROOT_CRL, root.content.hex().encode())
    found: list[Item] = []
    for each in needs_of_tdx(intel.quote()):
        found.extend(fetch(each, client, hosts(served)))
    assert tuple(found) == tdx_items()
    # Without the header, or with another document's signer, nothing is taken.
    served.publish(TCB, tcb.content)
    with pytest.raises(CloisterError, match="signed it isn't among"):
        fetch(need("intel-tcb-info"), client, hosts(served))
    served.publish(TCB, tcb.content, TCB_Info_Issuer_Chain=issuer_chain(intel.pem(intel.PCK, intel.ROOT)))
    with pytest.raises(CloisterError, match="signed it isn't among"):
        fetch(need("intel-tcb-info"), client, hosts(served))


@pytest.mark.parametrize(
    ("status", "headers", "kind", "says"),
    [
        (404, {}, NotFoundError, "AMD has no certificate for this chip at this firmware"),
        (400, {}, NotFoundError, "doesn't know it"),
        (429, {}, TooManyRequestsError, "Wait a minute"),
        (429, {"retry-after": "17"}, TooManyRequestsError, "Wait 17 seconds"),
        (429, {"retry-after": "\x1b[2J"}, TooManyRequestsError, "Wait a minute"),
        (503, {}, UnreachableError, "--from FILE"),
        (403, {}, CloisterError, "refuses"),
    ],
)
def test_a_refusal_says_what_wasn_t_fetched_from_where_and_what_to_do(
    served: Publishers, client: httpx.Client, status: int, headers: dict[str, str], kind: type[Exception], says: str
) -> None:
    served.answers[VCEK] = Answer(b"\x1b[2J", status, headers)
    with pytest.raises(kind, match=says) as caught:
        fetch(need("amd-vcek"), client, hosts(served))
    assert f"{served.url}{VCEK}" in str(caught.value)
    assert "VCEK of the Genoa chip 6363" in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_nobody_answers(client: httpx.Client) -> None:
    with publishers() as gone:
        pass
    with pytest.raises(UnreachableError, match="curl on another machine"):
        fetch(need("amd-crl"), client, hosts(gone))


def test_too_much_is_not_read(served: Publishers, client: httpx.Client) -> None:
    limits = {"amd-vcek": VCEK, "amd-ask": "/vcek/v1/Genoa/cert_chain", "amd-crl": "/vcek/v1/Genoa/crl",
              "intel-tcb-info": TCB, "intel-root-crl": ROOT_CRL}  # fmt: skip
    for kind, path in limits.items():
        served.publish(path, bytes((8 << 20) + 1))
        with pytest.raises(TooLargeError, match="more than"):
            fetch(need(kind), client, hosts(served))
    served.publish(VCEK, b"", content_encoding="gzip")
    with pytest.raises(CloisterError, match="compressed"):
        fetch(need("amd-vcek"), client, hosts(served))


def test_a_slow_answer_ends(served: Publishers, client: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetching, "DEADLINE", -1.0)
    served.publish(VCEK, snp_items()[0].content)
    with pytest.raises(UnreachableError, match="longer than"):
        fetch(need("amd-vcek"), client, hosts(served))


def test_a_redirect_stays_on_its_host(served: Publishers, client: httpx.Client) -> None:
    crl, path = snp_items()[-1], "/vcek/v1/Genoa/crl"
    served.publish("/elsewhere", crl.content)
    served.answers[path] = Answer(status=302, headers={"location": "/elsewhere"})
    assert fetch(need("amd-crl"), client, hosts(served)) == (crl,)
    with publishers() as stranger:
        stranger.publish("/elsewhere", crl.content)
        for location in (f"{stranger.url}/elsewhere", "https://kds.example/x", "file:///etc/passwd", "http://[::1"):
            served.answers[path] = Answer(status=302, headers={"location": location})
            with pytest.raises(CloisterError, match=r"redirects to another host|Invalid URL"):
                fetch(need("amd-crl"), client, hosts(served))
        assert stranger.asked == []
    served.answers[path] = Answer(status=307, headers={"location": path})
    with pytest.raises(CloisterError, match="without an end"):
        fetch(need("amd-crl"), client, hosts(served))


@pytest.mark.parametrize("other", ["chip", "html", "half"])
def test_another_answer_than_asked_is_refused(served: Publishers, client: httpx.Client, other: str) -> None:
    kind, path = ("amd-ask", "/vcek/v1/Genoa/cert_chain") if other == "half" else ("amd-vcek", VCEK)
    bodies: dict[str, Any] = {
        "chip": snp_items("Turin")[0].content,
        "html": b"<html>log in</html>",
        "half": as_pem(snp_items()[1].content),
    }
    served.publish(path, bodies[other])
    with pytest.raises(CloisterError, match="The answer"):
        fetch(need(kind), client, hosts(served))
