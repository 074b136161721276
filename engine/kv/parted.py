"""One request's pages in several processes, each of which holds some KV heads of all of them.

A decode worker that spans devices has as many receivers as ranks. To a prefill rank they are one
destination: what it pushes is cut by heads, whatever heads it has itself, and each part goes its
own way by the same transport. So any mesh hands off to any other.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from .destination import Destination, PartedDestination
from .hand_off import HandOff, Place, Sender
from .pages import HeldPages


class PartedSender(Sender):
    """A rank's end of any transport, which knows destinations of several parts as well."""

    def __init__(self, inner: Sender) -> None:
        self._inner = inner

    def open(self, destination: Destination) -> HandOff:
        if not isinstance(destination, PartedDestination):
            return self._inner.open(destination)
        return PartedHandOff(
            [(part.kv_heads, self._inner.open(part.destination)) for part in destination.parts]
        )


class PartedHandOff(HandOff):
    """A hand-off for each part; together they fail or succeed."""

    def __init__(self, parts: Sequence[tuple[range, HandOff]]) -> None:
        self._parts = parts

    @property
    def failure(self) -> str | None:
        failures = (hand_off.failure for _, hand_off in self._parts)
        return next((failure for failure in failures if failure is not None), None)

    def push(self, place: Place, pages: HeldPages) -> None:
        for kv_heads, hand_off in self._parts:
            for own_place, own in _part_of(kv_heads, place, pages):
                hand_off.push(own_place, own)

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        for kv_heads, hand_off in self._parts:
            own = [each for pages in wanted for each in _part_of(kv_heads, *pages)]
            if own:
                hand_off.fetch(own)

    def flush(self) -> None:
        for _, hand_off in self._parts:
            hand_off.flush()

    def abandon(self) -> None:
        for _, hand_off in self._parts:
            hand_off.abandon()


def _part_of(kv_heads: range, place: Place, pages: HeldPages) -> Iterator[tuple[Place, HeldPages]]:
    """What falls to some KV heads of the model, if any, of pages from the place's head on."""
    first, count = place.first_kv_head, pages.layer.values.shape[1]
    start, stop = max(first, kv_heads.start), min(first + count, kv_heads.stop)
    if stop - start == count:
        yield place, pages
    elif start < stop:
        yield replace(place, first_kv_head=start), pages.heads(start - first, stop - start)
