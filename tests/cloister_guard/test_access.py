"""Who may do what: roles, owners' signatures, kernels' sockets, passwords and tokens."""

import re
import secrets
import socket
import sqlite3
import time
from pathlib import Path

import httpx
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

import cloister.profile
import cloister.session
from cloister.transport import Transport
from cloister_data.accounts import AccountList
from cloister_data.control import ControlAnswer, RegisterKernel
from cloister_data.datasets import Declaration, PolicyView, UploadView
from cloister_data.errors import (
    AuthenticationError,
    CloisterError,
    ConflictError,
    ForbiddenError,
    InvalidRequestError,
    NotFoundError,
    PolicyRefusedError,
    SessionExpiredError,
    TooManyRequestsError,
)
from cloister_data.framing import pack_body, pack_frame
from cloister_data.identity import LoginRequest, NewUser, UserList, UserView, WhoAmI
from cloister_data.owner import public_bytes, sign_policy
from cloister_data.policy import Limit
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy, running_cloister

DATASET = "acc-owner/people"


@pytest.fixture(scope="module")
def ready(shared_cloister: RunningCloister) -> RunningCloister:
    shared_cloister.add_user("acc-ann", "scientist")
    shared_cloister.add_user("acc-rival", "owner")
    shared_cloister.upload(DATASET, people(50), PEOPLE, make_policy(DATASET, {"acc-ann": 1.0}))
    return shared_cloister


def declare(dataset: str, key: Ed25519PrivateKey, **changes: object) -> bytes:
    given: dict[str, object] = {
        "dataset": dataset,
        "population": dataset,
        "data_schema": PEOPLE,
        "data_format": "csv",
        "owner_key": public_bytes(key),
        "policy": sign_policy(make_policy(dataset, {"acc-ann": 1.0}), key),
    }
    declaration = Declaration.model_validate(given | changes)
    return pack_body(declaration.to_json(), people(20).to_csv(index=False).encode())


def send(cloister_: RunningCloister, user: str, body: bytes) -> UploadView:
    transport = cloister_.session(user).transport
    return transport.call("POST", "/datasets", body, UploadView, "application/vnd.cloister.upload")


def test_who_am_i(ready: RunningCloister) -> None:
    me = ready.session("acc-ann").transport.call("GET", "/me", None, WhoAmI)
    assert (me.user, me.role, me.simulated) == ("acc-ann", "scientist", True)


def test_scientists_and_owners_are_no_admins(ready: RunningCloister) -> None:
    new = NewUser(user="acc-x", role="admin", password="long enough")
    for user in ("acc-ann", "acc-owner"):
        transport = ready.session(user).transport
        with pytest.raises(ForbiddenError):
            transport.call("POST", "/users", new, UserView)
        with pytest.raises(ForbiddenError):
            transport.call("GET", "/users", None, UserList)
    names = [user.user for user in ready.session("admin").transport.call("GET", "/users", None, UserList).users]
    assert "acc-x" not in names


def test_a_name_is_taken_once(ready: RunningCloister) -> None:
    new = NewUser(user="acc-ann", role="admin", password="long enough")
    with pytest.raises(ConflictError):
        ready.session("admin").transport.call("POST", "/users", new, UserView)


def test_only_owners_upload_and_only_under_their_own_name(ready: RunningCloister) -> None:
    key = Ed25519PrivateKey.generate()
    for user in ("acc-ann", "admin"):
        with pytest.raises(ForbiddenError):
            send(ready, user, declare(f"{user}/x", key))
    with pytest.raises(ForbiddenError):
        send(ready, "acc-rival", declare(DATASET, key))
    with pytest.raises(ForbiddenError):
        send(ready, "acc-rival", declare("acc-rival/x", key, population=DATASET))


def test_the_pinned_key_alone_speaks_for_an_owner(ready: RunningCloister) -> None:
    transport = ready.session("acc-owner").transport
    key = ready.session("acc-owner").profile.owner_key()
    thief = Ed25519PrivateKey.generate()
    generous = make_policy(DATASET, {"acc-ann": 1000.0}, version=2, population_limit=Limit(epsilon=1000, delta=1e-5))
    path = f"/datasets/{DATASET}/policy"
    before = transport.call("GET", path, None, PolicyView)

    # Signed in as the owner with a stolen password, but without the key.
    with pytest.raises(PolicyRefusedError):
        transport.call("PUT", path, sign_policy(generous, thief), PolicyView)
    with pytest.raises(PolicyRefusedError):
        send(ready, "acc-owner", declare("acc-owner/other", thief))
    # The admin may not even with the key's signature, nor replay it elsewhere or later.
    signed = sign_policy(generous, key)
    for user in ("admin", "acc-ann"):
        with pytest.raises(ForbiddenError):
            ready.session(user).transport.call("PUT", path, signed, PolicyView)
    with pytest.raises(PolicyRefusedError):
        transport.call("PUT", path, sign_policy(make_policy(DATASET, {}, version=3), key), PolicyView)
    with pytest.raises(PolicyRefusedError):
        transport.call("PUT", path, sign_policy(make_policy("acc-owner/y", {}, version=2), key), PolicyView)
    assert transport.call("GET", path, None, PolicyView) == before
    # The positive control: the owner's own signature is taken, once.
    assert transport.call("PUT", path, signed, PolicyView).signed.policy() == generous
    with pytest.raises(PolicyRefusedError):
        transport.call("PUT", path, signed, PolicyView)
    accounts = ready.session("acc-ann").transport.call("GET", "/accounts", None, AccountList).accounts
    assert {account.limit.epsilon for account in accounts if account.population == DATASET} == {1000.0}


def test_a_policy_may_name_everybody_that_it_can_name(ready: RunningCloister) -> None:
    name, names = "acc-owner/everybody", [f"user-{number}" for number in range(1000)]
    key = ready.session("acc-owner").profile.owner_key()
    group = {"limit": Limit(epsilon=1, delta=1e-5), "members": tuple(names)}
    policy = make_policy(name, dict.fromkeys(["acc-ann", *names[:999]], 1.0), groups={"all": group})
    others = ready.statement("acc-owner", name, key)
    assert send(ready, "acc-owner", declare(name, key, policy=sign_policy(policy, key), statement=others)).version == 1


def test_a_new_version_keeps_population_and_accounts(ready: RunningCloister) -> None:
    name = "acc-owner/versions"
    key = ready.session("acc-owner").profile.owner_key()
    others = ready.statement("acc-owner", name, key)
    assert send(ready, "acc-owner", declare(name, key, statement=others)).version == 1
    with pytest.raises(ConflictError):
        send(ready, "acc-owner", declare(name, key))
    with pytest.raises(ConflictError):
        send(ready, "acc-owner", declare(name, key, policy=None, population="acc-owner/fresh"))
    assert send(ready, "acc-owner", declare(name, key, policy=None)).version == 2


@pytest.mark.parametrize(
    ("changes", "operation", "rule"),
    [
        ({"expires": 1_000_000_000}, "mean", "expired"),
        ({"platforms": ("sev-snp",)}, "mean", "platform"),
        ({"operations": ("count",)}, "mean", "operation"),
        ({"epsilon_cap": 0.01}, "mean", "cap"),
    ],
)
def test_the_policy_refuses_with_its_rule(
    ready: RunningCloister, changes: dict[str, object], operation: str, rule: str
) -> None:
    name = f"acc-owner/{rule}-{secrets.token_hex(2)}"
    key = ready.session("acc-owner").profile.owner_key()
    policy = make_policy(name, {"acc-ann": 1.0}, **changes)
    others = ready.statement("acc-owner", name, key)
    send(ready, "acc-owner", declare(name, key, policy=sign_policy(policy, key), statement=others))
    question = Question.model_validate({"source": {"dataset": name}, "operation": operation, "column": "height"})
    request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.5)
    with pytest.raises(PolicyRefusedError) as caught:
        ready.session("acc-ann").transport.call("POST", "/queries", request, Release)
    assert rule in str(caught.value)


def test_a_bad_upload_stores_nothing(ready: RunningCloister) -> None:
    key = ready.session("acc-owner").profile.owner_key()
    files = sorted((ready.state / "data").iterdir())
    rows = people(20)
    rows.loc[3, "height"] = 999.0
    head = declare("acc-owner/bad", key, statement=ready.statement("acc-owner", "acc-owner/bad", key))
    body = head[: head.index(b"height,age")] + rows.to_csv(index=False).encode()
    with pytest.raises(InvalidRequestError, match="height"):
        send(ready, "acc-owner", body)
    assert sorted((ready.state / "data").iterdir()) == files


def test_wrong_passwords_do_not_tell_names(ready: RunningCloister) -> None:
    transport = ready.session("acc-ann").transport
    told = []
    for user in ("acc-ann", "acc-nobody"):
        with pytest.raises(AuthenticationError) as caught:
            transport.raw("POST", "/login", LoginRequest(user=user, password="wrong password"))
        told.append(str(caught.value))
    assert told[0] == told[1]


def test_guessing_is_slowed_down_for_known_and_unknown_names(ready: RunningCloister) -> None:
    transport = ready.session("acc-ann").transport
    for user in ("acc-rival", "acc-ghost"):
        answers = []
        for _ in range(12):
            with pytest.raises((AuthenticationError, TooManyRequestsError)) as caught:
                transport.raw("POST", "/login", LoginRequest(user=user, password="wrong password"))
            answers.append(caught.type)
        assert answers[:5] == [AuthenticationError] * 5
        assert answers[-1] is TooManyRequestsError


def test_without_a_token_nothing_but_evidence_and_sign_in_is_offered(ready: RunningCloister) -> None:
    session = cloister.session.open(ready.session("acc-ann").profile, need_token=False)
    session.attach("x" * 40)
    document = session.client.get("/api/v1/openapi.json").json()
    open_routes = {"/.well-known/attest", "/.well-known/consistency", "/api/v1/login", "/api/v1/witness"}
    tried = 0
    for path, verbs in document["paths"].items():
        if path in open_routes:
            continue
        for verb in verbs:
            url = path.replace("{owner}", "a").replace("{name}", "b").replace("{action}", "interrupt")
            url = url.replace("{path}", "x")
            for name in ("job", "release", "kernel", "request"):
                url = url.replace("{" + name + "}", "0" * 32)
            answer = session.client.request(verb, url, content=b"{}")
            assert (answer.status_code, answer.json()["code"]) == (401, "session-expired"), (verb, path)
            assert answer.headers["content-type"] == "application/problem+json"
            tried += 1
    assert tried >= 20
    session.close()


def test_an_expired_or_withdrawn_token_ends_the_session() -> None:
    with running_cloister() as own:
        admin = own.session("admin").transport
        assert admin.call("GET", "/me", None, WhoAmI).user == "admin"
        database = sqlite3.connect(own.state / "cloister.db")
        database.execute("UPDATE tokens SET expires = ?", (int(time.time()) - 1,))
        database.commit()
        with pytest.raises(SessionExpiredError, match="cloister connect"):
            admin.call("GET", "/me", None, WhoAmI)
        fresh = own.sessions.pop("admin")
        fresh.close()
        again = own.session("admin").transport
        again.raw("POST", "/logout")
        with pytest.raises(SessionExpiredError):
            again.call("GET", "/me", None, WhoAmI)
        # The token's own text is nowhere in the database.
        token = own.sessions["admin"].token
        assert token is not None
        dump = "".join(database.iterdump())
        database.close()
        assert token not in dump


def register(ready: RunningCloister, user: str) -> ControlAnswer:
    """Say on the control socket, as the kernel service that runs, that there is a kernel of this user."""
    deadline = time.monotonic() + 30
    while not (found := re.search("listening service=([0-9a-f]{32})", (ready.base / "serve.log").read_text())):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    order = RegisterKernel(kernel=secrets.token_hex(16), uid=0, user=user, sandbox="user", service=found[1])
    with socket.socket(socket.AF_UNIX) as peer:
        peer.connect(str(ready.runtime / "control.sock"))
        peer.sendall(pack_frame(order.to_json()))
        length = int.from_bytes(peer.recv(4, socket.MSG_WAITALL))
        return ControlAnswer.from_json(peer.recv(length, socket.MSG_WAITALL))


def test_a_kernel_socket_offers_scientists_routes_alone_whoever_its_user_is(ready: RunningCloister) -> None:
    answer = register(ready, "admin")
    assert answer.problem is None
    kernel = Path(answer.socket).parent.name
    with Transport.unix(answer.socket) as transport:
        assert transport.call("GET", "/me", None, WhoAmI).role == "scientist"
        for verb, path in (
            ("GET", "/users"), ("POST", "/users"), ("POST", "/kernels"), ("GET", "/kernels"), ("POST", "/datasets"),
            ("PUT", f"/datasets/{DATASET}/policy"), ("POST", "/login"), ("POST", "/.well-known/attest"),
            ("GET", "/metrics"), ("GET", f"/kernels/{kernel}/files/x"), ("PUT", f"/kernels/{kernel}/files/x"),
        ):  # fmt: skip
            with pytest.raises((NotFoundError, InvalidRequestError), match="route"):
                transport.raw(verb, path, b"{}")
        # A header can't say who it is.
        head = {"authorization": "Bearer " + (ready.session("acc-ann").token or ""), "cloister.caller": "acc-ann"}
        assert transport.client.get("/api/v1/me", headers=head).json()["user"] == "admin"
    assert Path(answer.socket).stat().st_mode & 0o777 == 0o600


def test_the_minimum_sandbox_binds_kernels(ready: RunningCloister) -> None:
    name = f"acc-owner/confined-{secrets.token_hex(2)}"
    key = ready.session("acc-owner").profile.owner_key()
    policy = make_policy(name, {"acc-ann": 1.0}, minimum_sandbox="confined")
    others = ready.statement("acc-owner", name, key)
    send(ready, "acc-owner", declare(name, key, policy=sign_policy(policy, key), statement=others))
    answer = register(ready, "acc-ann")
    question = Question.model_validate({"source": {"dataset": name}, "operation": "count"})
    request = QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.5)
    with Transport.unix(answer.socket) as transport, pytest.raises(PolicyRefusedError, match="sandbox"):
        transport.call("POST", "/queries", request, Release)


def test_an_unforeseen_error_is_one_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    from cloister_guard.release import problem

    told = {problem(error).to_json() for error in (ValueError("row 7 holds 3.1"), KeyError("x"), MemoryError())}
    assert len(told) == 1
    assert problem(NotFoundError("No.")).code == "not-found"


def test_what_is_no_route_is_a_problem_too(ready: RunningCloister) -> None:
    client = ready.session("acc-ann").client
    for verb, path, status, code in (
        ("GET", "/", 404, "not-found"),
        ("GET", "/api/v1/nothing", 404, "not-found"),
        ("PATCH", "/api/v1/me", 405, "invalid-request"),
        ("GET", "/api/v1/jobs/not-an-id", 404, "not-found"),
        ("GET", "/api/v1/datasets/UPPER/case", 404, "not-found"),
    ):
        answer = client.request(verb, path)
        told = answer.json()
        assert (answer.status_code, told["status"], told["code"]) == (status, status, code), (verb, path)
        assert answer.headers["content-type"] == "application/problem+json"


def test_plain_http_and_old_tls_get_nothing(ready: RunningCloister) -> None:
    address = ready.url.removeprefix("https://")
    with pytest.raises(httpx.HTTPError):
        httpx.get(f"http://{address}/api/v1/me", trust_env=False)


def test_the_errors_have_distinct_codes() -> None:
    codes: dict[str, type] = {}
    for kind in CloisterError.__subclasses__():
        assert codes.setdefault(kind.code, kind) is kind or kind.code == "internal"
