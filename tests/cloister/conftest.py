"""A kernel's view of a cloister: the environment names a socket, and a recording guard listens there."""

from collections.abc import Iterator

import pytest

from cloister import connection
from tests.fakes import answers
from tests.fakes.recording_guard import RecordingGuard, recording_guard


@pytest.fixture
def guard(monkeypatch: pytest.MonkeyPatch) -> Iterator[RecordingGuard]:
    with recording_guard() as found:
        found.routes["GET /datasets/hospital-a/patients"] = answers.dataset()
        found.routes["GET /datasets/hospital-b/patients"] = answers.dataset("hospital-b/patients")
        found.routes["GET /accounts"] = answers.accounts("hospital-a/patients", "hospital-b/patients")
        monkeypatch.setenv("CLOISTER_GUARD_SOCKET", str(found.socket))
        yield found
        connection.forget()
