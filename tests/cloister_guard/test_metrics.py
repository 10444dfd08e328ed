"""Metrics: for admins alone, of a closed set of series, and the same whatever the rows, the people and the budgets."""

from __future__ import annotations

import asyncio
import contextlib
import re
import secrets
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import pandas as pd
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from fastapi.routing import APIRoute
from prometheus_client import REGISTRY
from prometheus_client.parser import text_string_to_metric_families

from cloister_data.datasets import Declaration
from cloister_data.framing import pack_body
from cloister_data.identity import LoginRequest, NewUser, Role
from cloister_data.kernels import EndingKind, KernelFigures
from cloister_data.owner import public_bytes, sign_policy
from cloister_data.statistics import QueryRequest, Question
from cloister_guard.config import GuardConfig
from cloister_guard.guard import VERSION, Guard
from cloister_guard.http import audit, laptop, scientist
from cloister_guard.http import metrics as route
from cloister_guard.http.servers import kernel_app, laptop_app
from cloister_guard.identity import Caller
from cloister_guard.metrics import CODES, METHODS, OTHER, STANDS_SECONDS, UNMATCHED
from tests.fakes.data import PEOPLE, people
from tests.fakes.documents import ROOT, table
from tests.fakes.running import make_policy

PASSWORD = "long enough"
FIGURES = KernelFigures(
    service="5" * 32, running=3, starting=1, warm=2, memory_bytes=4 << 30, started=9, ended={"memory": 5, "asked": 1}
)
Series = dict[tuple[str, tuple[tuple[str, str], ...]], float]


class House:
    """A guard with its own clock for the metrics, behind the application that it serves over HTTPS."""

    def __init__(self, directory: Path, runtime: Path) -> None:
        config = GuardConfig(
            name="metrics", listen="127.0.0.1:0", state_dir=directory, runtime_dir=runtime, platform="simulated",
        )  # fmt: skip
        self.guard = Guard(config)
        self.guard.recover()
        self.now = 0.0
        self.guard.metrics._clock = lambda: self.now
        for name, role in (("root", "admin"), ("ann", "scientist"), ("hosp", "owner")):
            self.add(name, role)  # type: ignore[arg-type]
        self.app = route.Counted(laptop_app(self.guard), self.guard.metrics)

    def add(self, name: str, role: Role) -> None:
        self.guard.identity.create(NewUser(user=name, role=role, password=PASSWORD))

    def publish(self, dataset: str, user: str, epsilon: float, rows: pd.DataFrame) -> None:
        owner, key = dataset.split("/")[0], Ed25519PrivateKey.generate()
        declaration = Declaration(
            dataset=dataset, population=dataset, data_schema=PEOPLE, data_format="csv", owner_key=public_bytes(key),
            policy=sign_policy(make_policy(dataset, {user: epsilon}), key),
        )  # fmt: skip
        body = pack_body(declaration.to_json(), rows.to_csv(index=False).encode())
        self.guard.catalogue.upload(Caller(owner, "owner"), body)

    @contextlib.asynccontextmanager
    async def client(self, user: str | None = None) -> AsyncIterator[httpx.AsyncClient]:
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="https://guard") as client:
            if user is not None:
                body = LoginRequest(user=user, password=PASSWORD).to_json()
                answer = await client.post("/api/v1/login", content=body)
                client.headers["authorization"] = f"Bearer {answer.json()['token']}"
            yield client

    async def raw(self, method: str, path: str, headers: dict[str, str]) -> None:
        """A request as no client would make it."""

        async def receive() -> dict[str, object]:
            return {"type": "http.request", "body": b""}

        async def send(message: Any) -> None:
            pass

        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "scheme": "https", "method": method,
            "path": path, "raw_path": path.encode(), "query_string": b"evil=1", "root_path": "",
            "headers": [(name.encode(), text.encode()) for name, text in headers.items()],
            "client": ("evil", 1), "server": ("guard", 443),
        }  # fmt: skip
        await self.app(scope, receive, send)

    async def metrics(self, admin: httpx.AsyncClient) -> str:
        """The text, taken anew."""
        self.now += STANDS_SECONDS
        answer = await admin.get("/api/v1/metrics")
        assert answer.status_code == 200
        return answer.text


@contextlib.contextmanager
def opened(directory: Path) -> Iterator[House]:
    with tempfile.TemporaryDirectory(prefix="clo-run-") as runtime:
        found = House(directory, Path(runtime))
        yield found
        found.guard.database.close()


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    with opened(tmp_path / "state") as found:
        yield found


def series(text: str) -> Series:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(text: str, name: str, **labels: str) -> float:
    return series(text).get((f"cloister_{name}", tuple(sorted(labels.items()))), 0.0)


def count(dataset: str, epsilon: float) -> bytes:
    question = Question.model_validate({"source": {"dataset": dataset}, "operation": "count"})
    return QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=epsilon).to_json()


def test_admins_get_it_and_nobody_else(house: House) -> None:
    async def scenario() -> None:
        async with house.client("root") as admin, house.client() as nobody:
            answer = await admin.get("/api/v1/metrics")
            assert answer.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            assert answer.headers["cache-control"] == "no-store"
            told = series(answer.text)
            assert told["cloister_build_info", (("platform", "simulated"), ("version", VERSION))] == 1
            assert told["cloister_database_up", ()] == 1
            assert told["cloister_log_entries", ()] >= 5
            assert told["cloister_sign_ins_total", (("outcome", "accepted"),)] == 1
            for headers in ({}, {"authorization": "Bearer " + "x" * 40}):
                refused = await nobody.get("/api/v1/metrics", headers=headers)
                assert (refused.status_code, refused.json()["code"]) == (401, "session-expired")
            for user in ("ann", "hosp"):
                async with house.client(user) as other:
                    refused = await other.get("/api/v1/metrics")
                    assert (refused.status_code, refused.json()["code"]) == (403, "forbidden")
                    assert "cloister_" not in refused.text

    asyncio.run(scenario())


@pytest.mark.parametrize("role", get_args(Role))
def test_a_kernels_socket_has_no_such_route(house: House, role: Role) -> None:
    inner = kernel_app(house.guard)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        scope["cloister.caller"] = Caller("root", role, "user")
        await inner(scope, receive, send)

    async def scenario() -> None:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://guard") as client:
            assert (await client.get("/api/v1/me")).status_code == 200
            assert (await client.get("/api/v1/metrics")).status_code == 404

    asyncio.run(scenario())


def templates(house: House) -> set[str]:
    guard, who = house.guard, lambda: None
    made = (laptop.make_router(guard), *(part.make_router(guard, who) for part in (scientist, audit, route)))
    return {getattr(each, "path", "") for router in made for each in router.routes}


HOSTILE = [
    *((method, f"/{word}") for method in ("GET", "BREW", "get", "X" * 200) for word in ("", "a/b", "é", "\0\n")),
    *(("GET", f"/api/v1/nothing/{number}") for number in range(50)),
    *(("GET", f"/api/v1/datasets/own-{number}/set-{number}") for number in range(20)),
    *(("GET", f"/api/v1/jobs/{number:032x}") for number in range(20)),
    ("GET", '/api/v1/jobs/"} 1\ncloister_evil{x="'),
    ("GET", "/api/v1/me/"),
    ("PATCH", "/api/v1/me"),
    ("POST", "/api/v1/metrics"),
    ("POST", "/api/v1/login"),
    ("DELETE", "/.well-known/attest"),
]


def test_labels_are_a_closed_set_whatever_is_asked(house: House) -> None:
    async def scenario() -> None:
        async with house.client("root") as admin, house.client() as nobody:
            plain = await house.metrics(admin)
            for method, path in HOSTILE:
                for bearer in (admin.headers["authorization"], "Bearer evil\ncloister_evil 1"):
                    await house.raw(method, path, {"authorization": bearer, "host": 'evil"} 1', "x-evil": "a\nb 1"})
            body = LoginRequest(user="evil", password="evil evil").to_json()
            assert (await nobody.post("/api/v1/login", content=body)).status_code == 401
            text = await house.metrics(admin)
        allowed = {
            "route": templates(house) | {UNMATCHED, "/api/v1/openapi.json"}, "method": METHODS | {OTHER},
            "status": {*(f"{kind}xx" for kind in range(1, 6)), OTHER}, "code": CODES | {OTHER},
            "outcome": {"accepted", "failed"}, "pool": {"queries", "jobs"}, "version": {VERSION},
            "platform": {"simulated"}, "state": {"running", "starting", "warm"}, "reason": set(get_args(EndingKind)),
        }  # fmt: skip
        for _, labels in series(text):
            for name, found in labels:
                assert found in allowed[name], (name, found)
        assert "evil" not in text
        # A request more or less makes no series but of the few that a route has.
        assert len(series(text)) < len(series(plain)) + 40
        assert value(text, "http_requests_total", route=UNMATCHED, method="GET", status="4xx") >= 100
        assert value(text, "http_requests_total", route="/api/v1/jobs/{job}", method="GET", status="4xx") >= 40
        assert value(text, "http_requests_total", route="/api/v1/me", method=OTHER, status="4xx") == 2
        assert value(text, "sign_ins_total", outcome="failed") >= 3
        assert value(text, "refusals_total", code="not-found") >= 100

    asyncio.run(scenario())


def test_a_fault_of_ours_and_a_client_that_left_are_counted(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with house.client("root") as admin:
            monkeypatch.setattr(house.guard.identity, "users", lambda: 1 / 0)
            assert (await admin.get("/api/v1/users")).status_code == 500
            text = await house.metrics(admin)
        assert value(text, "http_requests_total", route="/api/v1/users", method="GET", status="5xx") == 1
        assert value(text, "refusals_total", code="internal") == 1

        async def gone(scope: Any, receive: Any, send: Any) -> None:
            raise asyncio.CancelledError

        with pytest.raises(asyncio.CancelledError):
            await route.Counted(gone, house.guard.metrics)({"type": "http", "method": "GET"}, None, None)  # type: ignore[arg-type]
        assert house.guard.metrics._requests[UNMATCHED, "GET", OTHER] == 1

    asyncio.run(scenario())


def test_the_figures_stand_still_for_a_minute(house: House) -> None:
    """Otherwise who asks all the time could time what runs."""

    async def scenario() -> None:
        async with house.client("root") as admin:
            first = await house.metrics(admin)
            house.guard.jobs._running["0" * 32] = object()  # type: ignore[assignment]
            assert (await admin.get("/api/v1/metrics")).text == first
            house.now += STANDS_SECONDS - 0.1
            assert (await admin.get("/api/v1/metrics")).text == first
            house.now += 0.1
            # The control: a minute later it is seen.
            assert value((await admin.get("/api/v1/metrics")).text, "jobs_running") == 1

    asyncio.run(scenario())


def test_a_database_that_does_not_answer_is_told(house: House) -> None:
    async def scenario() -> None:
        async with house.client("root") as admin:
            assert value(await house.metrics(admin), "database_up") == 1
            figures = await route._figures(house.guard)
            # Who asks couldn't be known either: so the figures are looked at, and not the answer.
            (house.guard.config.state_dir / "cloister.db").rename(house.guard.config.state_dir / "away")
            assert (await route._figures(house.guard)).entries is None
            text = house.guard.metrics.show(await route._figures(house.guard)).decode()
            assert value(text, "database_up") == 0
            assert ("cloister_log_entries", ()) not in series(text)
            (house.guard.config.state_dir / "away").rename(house.guard.config.state_dir / "cloister.db")
            assert await route._figures(house.guard) == figures

    asyncio.run(scenario())


async def worked_on(house: House, dataset: str, user: str, epsilon: float) -> str:
    """The same requests of a scientist, some refused, some answered by a real worker; the metrics after them."""
    async with house.client("root") as admin, house.client(user) as scientist:
        for path in ("/api/v1/datasets", "/api/v1/accounts", f"/api/v1/datasets/{dataset}", "/api/v1/metrics"):
            await scientist.get(path)
        for asked in (epsilon, epsilon, 50.0):
            await scientist.post("/api/v1/queries", content=count(dataset, asked))
        await scientist.post("/api/v1/queries", content=count("no/such", 1.0))
        return await house.metrics(admin)


def test_another_dataset_and_other_people_give_the_same_metrics(tmp_path: Path) -> None:
    """Two cloisters, each with rows, a user, a dataset and limits of its own: nothing of them shows."""
    texts, names = [], []
    for number, (user, owner, rows, limit, epsilon) in enumerate(
        (("carla", "clinic", people(300, seed=1), 7.125, 0.375), ("dieter", "praxis", people(300, seed=2), 9.25, 0.625))
    ):
        if number:
            rows["height"], rows["ill"] = 100.0, False
        with opened(tmp_path / owner) as house:
            house.add(user, "scientist")
            house.add(owner, "owner")
            house.publish(f"{owner}/records", user, limit, rows)
            text = asyncio.run(worked_on(house, f"{owner}/records", user, epsilon))
        names += [user, owner, "records", "ann", "hosp", "root", str(limit), str(epsilon), "height", "ward"]
        texts.append(re.sub(r"(cloister_start_time_seconds) .*", r"\1", text))
        # The control: two questions were answered, and two refused.
        labels = {"route": "/api/v1/queries", "method": "POST"}
        assert value(text, "http_requests_total", status="2xx", **labels) == 2
        assert value(text, "http_requests_total", status="4xx", **labels) == 2
    assert texts[0] == texts[1]
    for name in names:
        assert not re.search(rf"\b{re.escape(name)}\b", texts[0].replace("/api/v1/", "")), name
    # Neither figures of budgets, nor times, which would tell how long something took.
    assert not re.search(r"epsilon|delta|budget_|seconds_(sum|bucket|count)|duration|_created", texts[0])


def test_the_librarys_own_registry_is_left_alone(house: House) -> None:
    """What other code of the process puts there isn't shown, and nothing of ours is there."""
    assert not [family for family in REGISTRY.collect() if family.name.startswith("cloister")]
    text = house.guard.metrics.show(asyncio.run(route._figures(house.guard))).decode()
    assert {family.name.split("_")[0] for family in text_string_to_metric_families(text)} == {"cloister"}


def test_the_runbook_names_every_metric_and_its_labels(house: House) -> None:
    async def scenario() -> str:
        house.guard.kernels.figures = FIGURES
        async with house.client("root") as admin:
            await admin.get("/nothing")
            return await house.metrics(admin)

    found: dict[str, set[str]] = {}
    for name, labels in series(asyncio.run(scenario())):
        found.setdefault(name, set()).update(label for label, _ in labels)
    rows = table(ROOT / "deploy" / "runbook.md", "metric")
    assert {row[0]: set(filter(None, row[1].split(", "))) for row in rows} == found


def test_the_kernels_are_told_while_their_service_answers(house: House) -> None:
    async def scenario() -> None:
        kernels = house.guard.kernels
        async with house.client("root") as admin:
            text = await house.metrics(admin)
            assert value(text, "kernel_service_up") == value(text, "kernel_service_starts_total") == 0
            assert "cloister_kernels_memory_bytes" not in text
            kernels.figures, kernels.services = FIGURES, 2
            text = await house.metrics(admin)
        assert value(text, "kernel_service_up") == 1
        assert value(text, "kernel_service_starts_total") == 2
        assert [value(text, "kernels", state=state) for state in ("running", "starting", "warm")] == [3, 1, 2]
        assert value(text, "kernels_memory_bytes") == 4 << 30
        assert value(text, "kernels_started_total") == 9
        assert value(text, "kernels_ended_total", reason="memory") == 5
        assert ("cloister_kernels_ended_total", (("reason", "idle"),)) in series(text)

    asyncio.run(scenario())


def test_every_route_that_is_counted_by_its_template_is_one(house: House) -> None:
    """That the framework puts the route into the scope, which the counting relies on."""

    async def scenario() -> None:
        async with house.client("root") as admin:
            for path in ("/api/v1/me", "/api/v1/datasets/a/b", f"/api/v1/releases/{'0' * 32}"):
                await admin.get(path)
        counted = {route for route, _, _ in house.guard.metrics._requests}
        assert {"/api/v1/me", "/api/v1/datasets/{owner}/{name}", "/api/v1/releases/{release}"} <= counted

    asyncio.run(scenario())
    assert any(isinstance(each, APIRoute) for each in scientist.make_router(house.guard, lambda: None).routes)
