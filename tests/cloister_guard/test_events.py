"""Events: for the right users, in order, resumable, and honest about what was missed."""

import asyncio

from cloister_data.events import AttestationEvent, Event, RequestEvent
from cloister_guard import events
from cloister_guard.events import EventHub


def request(number: int) -> RequestEvent:
    return RequestEvent(request=str(number), state="open")


async def take(hub: EventHub, user: str, count: int, last: str | None = None) -> list[Event]:
    found: list[Event] = []
    stream = hub.listen(user, last)
    async for event in stream:
        assert event is not None
        found.append(event)
        if len(found) == count:
            break
    await stream.aclose()  # type: ignore[attr-defined]
    return found


def test_a_reader_gets_its_own_events_and_those_for_all() -> None:
    async def scene() -> list[Event]:
        hub = EventHub()
        reading = asyncio.create_task(take(hub, "ann", 2))
        await asyncio.sleep(0)
        hub.publish(request(1), frozenset({"ann"}))
        hub.publish(request(2), frozenset({"bob"}))
        hub.publish(AttestationEvent(certificate="0" * 64), None)
        return await reading

    first, second = asyncio.run(scene())
    assert first.body == request(1)
    assert second.body == AttestationEvent(certificate="0" * 64)


def test_a_reader_resumes_after_the_last_event_it_saw() -> None:
    async def scene() -> tuple[list[Event], list[Event]]:
        hub = EventHub()
        reading = asyncio.create_task(take(hub, "ann", 1))
        await asyncio.sleep(0)
        for number in range(4):
            hub.publish(request(number), frozenset({"ann"}))
        seen = await reading
        return seen, await take(hub, "ann", 3, last=seen[-1].id)

    seen, rest = asyncio.run(scene())
    assert [event.body for event in seen + rest] == [request(number) for number in range(4)]


def test_what_was_missed_for_good_is_said() -> None:
    async def scene() -> list[str]:
        old = EventHub()
        old.publish(request(1), None)
        hub = EventHub()
        hub.publish(request(1), None)
        another_start = await take(hub, "ann", 1, last="0123456789abcdef-1")
        for number in range(events.KEPT + 10):
            hub.publish(request(number), None)
        too_old = await take(hub, "ann", 1, last=another_start[0].id)
        nonsense = await take(hub, "ann", 1, last="garbage")
        return [found[0].body.kind for found in (another_start, too_old, nonsense)]

    assert asyncio.run(scene()) == ["reset", "reset", "reset"]


def test_a_reader_that_does_not_keep_up_is_cut_off_and_misses_nothing() -> None:
    async def scene() -> tuple[list[Event], list[Event]]:
        hub = EventHub()
        stream = hub.listen("ann", None)
        waiting = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        hub.publish(request(0), None)
        seen = [await waiting]
        for number in range(1, events.QUEUED_PER_LISTENER + 50):
            hub.publish(request(number), None)
        async for event in stream:
            seen.append(event)
        kept = [event for event in seen if event is not None]
        missing = events.QUEUED_PER_LISTENER + 50 - len(kept)
        return kept, await take(hub, "ann", missing, last=kept[-1].id)

    kept, rest = asyncio.run(scene())
    assert [event.body for event in kept + rest] == [request(n) for n in range(events.QUEUED_PER_LISTENER + 50)]
