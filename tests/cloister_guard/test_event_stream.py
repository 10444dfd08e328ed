"""`/api/v1/events` over HTTPS: pushed when something changes, to those whom it concerns, resumable."""

import secrets
import threading
from queue import Queue

from cloister.transport import Transport
from cloister_data.datasets import SplitRef
from cloister_data.events import AccountEvent, Event, ResetEvent
from cloister_data.release import Release
from cloister_data.statistics import QueryRequest, Question
from tests.fakes.data import PEOPLE, people
from tests.fakes.running import RunningCloister, make_policy

DATASET = "stream/people"


def ask(transport: Transport) -> None:
    question = Question(source=SplitRef(dataset=DATASET), operation="count")
    transport.call(
        "POST", "/queries", QueryRequest(request_id=secrets.token_hex(16), question=question, epsilon=0.1), Release
    )


def listen(found: RunningCloister, user: str, last: str | None, count: int) -> "Queue[Event]":
    """Collect `count` events in a thread of its own, over a session of its own."""
    import cloister.session

    queue: Queue[Event] = Queue()
    session = cloister.session.open(found.session(user).profile)
    connected = threading.Event()

    def collect() -> None:
        stream = session.transport.events(last)
        connected.set()
        for _ in range(count):
            queue.put(next(stream))
        stream.close()
        session.close()

    threading.Thread(target=collect, daemon=True).start()
    connected.wait()
    return queue


def test_a_charge_is_pushed_to_its_user_and_resumes_where_it_broke(shared_cloister: RunningCloister) -> None:
    shared_cloister.add_user("stream-ann", "scientist")
    shared_cloister.add_user("stream-bob", "scientist")
    limits = {"stream-ann": 5.0, "stream-bob": 5.0}
    shared_cloister.upload(DATASET, people(50), PEOPLE, make_policy(DATASET, limits))
    ann = shared_cloister.session("stream-ann").transport

    # A first listener learns where the stream stands: what it names is unknown, so it is told to start anew.
    (reset,) = [listen(shared_cloister, "stream-ann", "0" * 16 + "-1", 1).get(timeout=10)]
    assert isinstance(reset.body, ResetEvent)

    ask(ann)
    events = [listen(shared_cloister, "stream-ann", reset.id, 2).get(timeout=10)]
    assert all(isinstance(event.body, AccountEvent) for event in events)

    # Whatever happened since `reset` comes in order and once, also to whoever asks again.
    queue = listen(shared_cloister, "stream-ann", reset.id, 2)
    again = [queue.get(timeout=10) for _ in range(2)]
    assert again[0] == events[0]
    accounts = {event.body.account.account for event in again if isinstance(event.body, AccountEvent)}
    assert accounts == {DATASET, f"{DATASET}:stream-ann"}

    # Bob is told of the total, which binds him too, and not of Ann's own account.
    told = listen(shared_cloister, "stream-bob", reset.id, 1).get(timeout=10)
    assert isinstance(told.body, AccountEvent)
    assert told.body.account.account == DATASET
