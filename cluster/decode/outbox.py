"""What a decode worker has said to each ingress, until the ingress fetches it.

An ingress has one call at a time under way to a worker, for all its requests there. So a step is
one message, however many answers go on with it; and an ingress that is slower than the steps
fetches more at a time, instead of falling behind.
"""

import asyncio
from contextlib import suppress

from ...engine.messages import Delta, Event

FORGOTTEN_TICKS = 60
"""Ticks without a call after which an ingress is taken to be gone for good."""

Said = list[tuple[str, list[Event]]]
"""Requests by name, each with its events in order."""


class Outboxes:
    """One for each ingress. For one event loop."""

    def __init__(self) -> None:
        self._boxes: dict[str, _Outbox] = {}

    def say(self, listener: str, request_id: str, event: Event) -> None:
        """Keep an event of a request for an ingress."""
        self._box(listener).put(request_id, event)

    async def fetch(self, listener: str, seconds: float) -> Said:
        """What was said to an ingress since its last call; nothing, where nothing comes in time."""
        return await self._box(listener).fetch(seconds)

    def tick(self) -> None:
        """Let a tick pass: what nobody fetches is forgotten."""
        for listener in [name for name, box in self._boxes.items() if box.is_forgotten()]:
            del self._boxes[listener]

    def __len__(self) -> int:
        return len(self._boxes)

    def _box(self, listener: str) -> "_Outbox":
        return self._boxes.setdefault(listener, _Outbox())


class _Outbox:
    def __init__(self) -> None:
        self._events: dict[str, list[Event]] = {}
        self._has_some = asyncio.Event()
        self._calls = 0
        self._silent_ticks = 0

    def put(self, request_id: str, event: Event) -> None:
        _append(self._events.setdefault(request_id, []), event)
        self._has_some.set()

    async def fetch(self, seconds: float) -> Said:
        self._calls += 1
        try:
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await self._has_some.wait()
        finally:
            self._calls -= 1
            self._silent_ticks = 0
        said, self._events = list(self._events.items()), {}
        self._has_some.clear()
        return said

    def is_forgotten(self) -> bool:
        self._silent_ticks = 0 if self._calls else self._silent_ticks + 1
        return self._silent_ticks > FORGOTTEN_TICKS


def _append(events: list[Event], event: Event) -> None:
    """Add an event; what a choice says is joined to what it said before and is still here."""
    if isinstance(event, Delta):
        for index, earlier in enumerate(events):
            if isinstance(earlier, Delta) and earlier.choice == event.choice:
                events[index] = _joined(earlier, event)
                return
    events.append(event)


def _joined(first: Delta, second: Delta) -> Delta:
    """One delta that says what two of a choice do, one after the other."""
    tokens = (*first.tokens, *second.tokens)
    return Delta(first.choice, first.text + second.text, tokens, second.finish_reason)
