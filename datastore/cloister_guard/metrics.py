"""What an operator may watch of a running guard, as Prometheus metrics, counted in a registry of its own.

Nothing here depends on rows, and nothing is about a person. There are no durations of queries, trainings or steps, for
their pace follows batch sizes, which are private; no users, datasets or models; no epsilon, no budget, no value. Every
label's values are a set that the code fixes: a request's own path, method or text is never one.

Whoever asks often enough could time a training by the gauges all the same. So the figures stand still: they are taken
anew after `STANDS_SECONDS` at the earliest, which is as coarse as the audit log's times are.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import get_args

from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from cloister_budget.entries import COARSE_SECONDS
from cloister_data import errors
from cloister_data.errors import CloisterError
from cloister_data.kernels import EndingKind, KernelFigures
from cloister_data.policy import Platform

MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STANDS_SECONDS = float(COARSE_SECONDS)

UNMATCHED = "unmatched"
"""Stands for every path that no route has: whoever asks for many makes one series of them."""

OTHER = "other"
METHODS = frozenset({"GET", "POST", "PUT", "DELETE", "WEBSOCKET"})
CODES = frozenset(
    kind.code for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, CloisterError)
)
LOGIN = "/api/v1/login"
ATTEST = "/.well-known/attest"


@dataclass(frozen=True)
class Figures:
    """What stands at a moment. `entries` are the audit log's; None where the database doesn't answer.

    `service` is what the kernel service said last; None where it doesn't answer.
    """

    query_workers: int
    job_workers: int
    jobs: int
    uploads: int
    kernels: int
    entries: int | None
    service: KernelFigures | None = None
    service_starts: int = 0


class Metrics(Collector):
    """The counters of one guard, and its last figures. To be used from the event loop."""

    def __init__(self, version: str, platform: Platform, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._about = {"version": version, "platform": platform}
        self._started = int(time.time())
        # Kept here and not in the library's counters: those also tell to the microsecond when each first counted.
        self._requests: Counter[tuple[str, str, str]] = Counter()
        self._refusals: Counter[str] = Counter()
        self._sign_ins: Counter[str] = Counter(accepted=0, failed=0)
        self._evidence = 0
        self._figures = Figures(0, 0, 0, 0, 0, None)
        self._shown: tuple[float, bytes] | None = None
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(self)

    def answered(self, route: str | None, method: str, status: int, code: str | None) -> None:
        """Count a request. `route` is its route's template, None where there is none; `code` that of its problem."""
        template = UNMATCHED if route is None else route
        kind = f"{status // 100}xx" if 100 <= status <= 599 else OTHER
        self._requests[template, method if method in METHODS else OTHER, kind] += 1
        if code is not None:
            self._refusals[code if code in CODES else OTHER] += 1
        if route == LOGIN and method == "POST":
            self._sign_ins["accepted" if status == 200 else "failed"] += 1
        self._evidence += route == ATTEST and method == "POST" and status == 200

    def standing(self) -> bytes | None:
        """The text as it was shown last, while it has to stand."""
        if self._shown is None or self._clock() - self._shown[0] >= STANDS_SECONDS:
            return None
        return self._shown[1]

    def show(self, figures: Figures) -> bytes:
        """The text with these figures (Prometheus exposition format 0.0.4). It stands from now on."""
        self._figures = figures
        self._shown = (self._clock(), generate_latest(self._registry))
        return self._shown[1]

    def collect(self) -> Iterator[Metric]:
        """For the registry alone."""
        yield InfoMetricFamily("cloister_build", "The guard's version and its platform.", value=self._about)
        now = self._figures
        workers = GaugeMetricFamily("cloister_workers_busy", "Workers that hold a slot.", labels=["pool"])
        workers.add_metric(["queries"], now.query_workers)
        workers.add_metric(["jobs"], now.job_workers)
        yield workers
        for name, said, value in (
            ("start_time_seconds", "When the guard started, in Unix seconds.", self._started),
            ("jobs_running", "Trainings that are under way.", now.jobs),
            ("uploads_running", "Uploads that are being read.", now.uploads),
            ("kernels_registered", "Notebook kernels that have a socket to the guard.", now.kernels),
            ("database_up", "1 where the database answers.", int(now.entries is not None)),
        ):
            yield GaugeMetricFamily(f"cloister_{name}", said, value=value)
        if now.entries is not None:
            yield GaugeMetricFamily("cloister_log_entries", "Entries in the audit log.", value=now.entries)
        yield from _of_kernels(now.service, now.service_starts)
        yield CounterMetricFamily("cloister_evidence_served", "Answers with fresh evidence.", value=self._evidence)
        sign_ins = (((outcome,), count) for outcome, count in self._sign_ins.items())
        yield _counted("sign_ins", "Sign-ins by outcome.", ("outcome",), sign_ins)
        refusals = (((code,), count) for code, count in self._refusals.items())
        yield _counted("refusals", "Requests that were answered with a problem, by its code.", ("code",), refusals)
        labels = ("route", "method", "status")
        yield _counted("http_requests", "Requests by route and class of status.", labels, self._requests.items())


def _of_kernels(service: KernelFigures | None, starts: int) -> Iterator[Metric]:
    """What the kernel service reports; its counters start anew with it, as Prometheus expects of counters."""
    up = int(service is not None)
    yield GaugeMetricFamily("cloister_kernel_service_up", "1 where the kernel service answers.", value=up)
    said = "Starts of the kernel service that this guard has met."
    yield CounterMetricFamily("cloister_kernel_service_starts", said, value=starts)
    if service is None:
        return
    states = (("running", service.running), ("starting", service.starting), ("warm", service.warm))
    kernels = GaugeMetricFamily("cloister_kernels", "Notebook kernels by state.", labels=["state"])
    for state, count in states:
        kernels.add_metric([state], count)
    yield kernels
    said = "Memory that the notebook kernels hold."
    yield GaugeMetricFamily("cloister_kernels_memory_bytes", said, value=service.memory_bytes)
    said = "Notebook kernels that were started."
    yield CounterMetricFamily("cloister_kernels_started", said, value=service.started)
    ended = (((reason,), service.ended.get(reason, 0)) for reason in get_args(EndingKind))
    yield _counted("kernels_ended", "Notebook kernels that ended, by reason.", ("reason",), ended)


def _counted(
    name: str, said: str, labels: tuple[str, ...], counts: Iterable[tuple[tuple[str, ...], int]]
) -> CounterMetricFamily:
    family = CounterMetricFamily(f"cloister_{name}", said, labels=labels)
    for values, count in sorted(counts):
        family.add_metric(list(values), count)
    return family
