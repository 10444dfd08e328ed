"""Events for the people who watch: kept in memory, resumable by id, never holding anything private."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from cloister_data.events import Event, EventBody, ResetEvent

KEPT = 10_000
QUEUED_PER_LISTENER = 1_000


@dataclass(frozen=True)
class _Entry:
    number: int
    users: frozenset[str] | None
    event: Event


class EventHub:
    """Publishes events to the users they concern. Belongs to one event loop."""

    def __init__(self) -> None:
        self._epoch = secrets.token_hex(8)
        self._number = 0
        self._kept: deque[_Entry] = deque(maxlen=KEPT)
        self._listeners: dict[asyncio.Queue[_Entry | None], str] = {}

    def publish(self, body: EventBody, users: frozenset[str] | None) -> None:
        """Tell `users`, or everybody where that is None."""
        self._number += 1
        event = Event(id=f"{self._epoch}-{self._number}", at=int(time.time()), body=body)
        entry = _Entry(self._number, users, event)
        self._kept.append(entry)
        for queue, user in list(self._listeners.items()):
            if users is None or user in users:
                if queue.qsize() < QUEUED_PER_LISTENER:
                    queue.put_nowait(entry)
                else:
                    # A reader that doesn't keep up is cut off; it comes back with Last-Event-ID and misses nothing.
                    del self._listeners[queue]
                    queue.put_nowait(None)

    def close(self) -> None:
        """End every stream."""
        for queue in list(self._listeners):
            queue.put_nowait(None)
        self._listeners.clear()

    async def listen(self, user: str, last_id: str | None) -> AsyncGenerator[Event | None, None]:
        """The events of `user` after `last_id`, then those to come. None every 15 seconds: a sign of life."""
        queue: asyncio.Queue[_Entry | None] = asyncio.Queue()
        self._listeners[queue] = user
        try:
            sent = self._number
            for event in self._missed(user, last_id):
                yield event
            while True:
                try:
                    async with asyncio.timeout(15):
                        entry = await queue.get()
                except TimeoutError:
                    yield None
                    continue
                if entry is None:
                    return
                if entry.number > sent:
                    yield entry.event
        finally:
            self._listeners.pop(queue, None)

    def _missed(self, user: str, last_id: str | None) -> list[Event]:
        if last_id is None:
            return []
        epoch, _, number = last_id.partition("-")
        oldest = self._kept[0].number if self._kept else self._number + 1
        if epoch != self._epoch or not number.isdecimal() or int(number) + 1 < oldest or int(number) > self._number:
            return [Event(id=f"{self._epoch}-{self._number}", at=int(time.time()), body=ResetEvent())]
        return [
            entry.event
            for entry in self._kept
            if entry.number > int(number) and (entry.users is None or user in entry.users)
        ]
