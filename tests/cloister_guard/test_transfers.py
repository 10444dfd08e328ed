"""The guard's part of a file's way: whose kernel, which policy, and an entry before anything shows."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import socket
from collections.abc import Iterator

import pytest

from cloister_data.audit import AuditPage, AuditSearch
from cloister_data.datasets import PolicyView
from cloister_data.errors import (
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
)
from cloister_data.kernels import KernelLaunch, KernelView
from cloister_data.owner import sign_policy
from cloister_data.transfers import MAX_TRANSFER_BYTES, TransferTerms, TransferView
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy

USER, RIVAL = "tra-ann", "tra-rival"


@pytest.fixture(scope="module")
def kernel(shared_cloister: RunningCloister) -> Iterator[str]:
    for user in (USER, RIVAL):
        shared_cloister.add_user(user, "scientist")
    transport = shared_cloister.session(USER).transport
    view = transport.call("POST", "/kernels", KernelLaunch(), KernelView)
    yield view.kernel
    transport.call("DELETE", f"/kernels/{view.kernel}", receive=KernelView)


def put(cloister_: RunningCloister, kernel: str, path: str, content: bytes, user: str = USER) -> TransferView:
    transport = cloister_.session(user).transport
    return transport.upload(
        f"/kernels/{kernel}/files/{path}", iter([content] if content else []), len(content), TransferView
    )


def get(cloister_: RunningCloister, kernel: str, path: str, user: str = USER) -> bytes:
    with cloister_.session(user).transport.download(f"/kernels/{kernel}/files/{path}", 1 << 26) as (size, chunks):
        content = b"".join(chunks)
    assert len(content) == size
    return content


def entries(cloister_: RunningCloister, kind: str = "transfer", user: str = USER) -> list[dict[str, object]]:
    search = AuditSearch(user=user, kinds=(kind,))
    page = cloister_.session("admin").transport.call("POST", "/audit/search", search, AuditPage)
    found = []
    for entry in page.entries:
        facts = json.loads(entry.payload)["facts"]
        found.append(
            {key: entry.names.get(value, value) for key, value in facts.items() if isinstance(value, (str, int))}
        )
    return found


def test_each_file_is_in_the_log_by_its_digest_and_its_name_by_ref(
    shared_cloister: RunningCloister, kernel: str
) -> None:
    content = os.urandom((1 << 20) + 7)
    view = put(shared_cloister, kernel, "mueller.bin", content)
    digest = hashlib.sha256(content).hexdigest()
    assert view == TransferView(path="mueller.bin", size=len(content), sha256=digest)
    assert get(shared_cloister, kernel, "mueller.bin") == content
    common = {
        "kind": "transfer",
        "kernel": kernel,
        "user": USER,
        "file": "mueller.bin",
        "size": len(content),
        "content": digest,
    }
    assert entries(shared_cloister) == [common | {"direction": "put"}, common | {"direction": "get"}]
    # A leaf can never be erased: no name is in it.
    leaves = shared_cloister.session("admin").transport.raw("GET", "/audit/leaves?start=0")
    assert digest.encode() in leaves
    assert b"mueller" not in leaves
    assert not [path for path in shared_cloister.state.iterdir() if path.name.startswith("tmp")]


def test_the_terms_are_the_services_word(shared_cloister: RunningCloister, kernel: str) -> None:
    terms = shared_cloister.session(USER).transport.call("GET", f"/kernels/{kernel}/files", receive=TransferTerms)
    assert terms.max_bytes == MAX_TRANSFER_BYTES
    assert terms.machine == os.uname().machine


def test_nobody_else_reaches_a_kernels_home(shared_cloister: RunningCloister, kernel: str) -> None:
    before = entries(shared_cloister, user=RIVAL)
    assert get(shared_cloister, kernel, "mueller.bin")  # the control
    for user in (RIVAL, "admin"):
        with pytest.raises(NotFoundError):
            put(shared_cloister, kernel, "x", b"x", user)
        with pytest.raises(NotFoundError):
            get(shared_cloister, kernel, "mueller.bin", user)
        with pytest.raises(NotFoundError):
            shared_cloister.session(user).transport.call("GET", f"/kernels/{kernel}/files", receive=TransferTerms)
    with pytest.raises(NotFoundError):
        get(shared_cloister, secrets.token_hex(16), "mueller.bin")
    assert entries(shared_cloister, user=RIVAL) == before


@pytest.mark.parametrize(
    "path", ["%2E%2E/x", "a/%2e%2e/%2e%2e/x", "%2Fetc/passwd", "a%0Ab", "a%1Bb", "a%00b", "a//b", "a" * 300]
)
def test_paths_that_lead_out_or_steer_a_terminal(shared_cloister: RunningCloister, kernel: str, path: str) -> None:
    before = entries(shared_cloister)
    for attempt in (lambda: put(shared_cloister, kernel, path, b"x"), lambda: get(shared_cloister, kernel, path)):
        with pytest.raises((InvalidRequestError, NotFoundError)):
            attempt()
    assert entries(shared_cloister) == before


def test_a_long_name_is_refused(shared_cloister: RunningCloister, kernel: str) -> None:
    with pytest.raises(InvalidRequestError, match="1 to 255 characters"):
        put(shared_cloister, kernel, "a" * 60_000, b"x")


def announce(cloister_: RunningCloister, path: str, size: int) -> bytes:
    """The answer to a PUT that says its size, and sends nothing."""
    session = cloister_.session(USER)
    address = session.profile.address
    lines = (
        f"PUT /api/v1{path} HTTP/1.1",
        "Host: x",
        f"Authorization: Bearer {session.token}",
        f"Content-Length: {size}",
    )
    head = "\r\n".join([*lines, "", ""])
    plain = socket.create_connection((address.host, address.port), timeout=20)
    with session.ssl_context.wrap_socket(plain, server_hostname=address.host) as connection:
        connection.sendall(head.encode())
        return connection.recv(1 << 16)


def test_lengths_are_believed_of_nobody(shared_cloister: RunningCloister, kernel: str) -> None:
    before, session = entries(shared_cloister), shared_cloister.session(USER)
    address = f"/kernels/{kernel}/files/broken"
    assert announce(shared_cloister, address, MAX_TRANSFER_BYTES + 1).startswith(b"HTTP/1.1 413")
    without = session.client.put(f"/api/v1{address}", content=iter([b"x"]))
    assert (without.status_code, without.json()["code"]) == (422, "invalid-request")

    class BreaksOff(Exception):
        pass

    def half() -> Iterator[bytes]:
        yield b"x" * 1000
        raise BreaksOff

    with pytest.raises(BreaksOff):
        session.transport.upload(address, half(), 2000, TransferView)
    with pytest.raises(NotFoundError):
        get(shared_cloister, kernel, "broken")
    assert entries(shared_cloister) == before


def test_a_policy_that_comes_into_force_meanwhile_is_the_one_that_counts(
    shared_cloister: RunningCloister, kernel: str
) -> None:
    name = "tra-owner/records"
    allows = make_policy(name, {USER: 1.0}, transfers="allowed")
    shared_cloister.upload(name, people(50), PEOPLE, allows)
    before, owner = entries(shared_cloister), shared_cloister.session("tra-owner")

    def forbid(version: int, transfers: str) -> None:
        policy = make_policy(name, {USER: 1.0}, transfers=transfers, version=version)
        signed = sign_policy(policy, owner.profile.owner_key())
        owner.transport.call("PUT", f"/datasets/{name}/policy", signed, PolicyView)

    def body() -> Iterator[bytes]:
        yield b"x" * 1000
        forbid(2, "forbidden")
        yield b"x" * 1000

    transport = shared_cloister.session(USER).transport
    refusals = len(entries(shared_cloister, "refused"))
    with pytest.raises(PolicyRefusedError, match=name):
        transport.upload(f"/kernels/{kernel}/files/late", body(), 2000, TransferView)
    with pytest.raises(PolicyRefusedError, match=name):
        get(shared_cloister, kernel, "mueller.bin")
    with pytest.raises(PolicyRefusedError, match=name):
        transport.call("GET", f"/kernels/{kernel}/files", receive=TransferTerms)
    assert entries(shared_cloister) == before
    assert len(entries(shared_cloister, "refused")) == refusals + 3
    forbid(3, "allowed")
    with pytest.raises(NotFoundError):
        get(shared_cloister, kernel, "late")  # nothing of it remains
    assert put(shared_cloister, kernel, "late", b"x").size == 1  # the control
