"""What an ingress asked for does not outlive it."""

import time
from collections.abc import Iterable

import pytest

from longreach.cluster import leases
from longreach.cluster.leases import TICKS_WITHOUT_RENEWAL, LeaseBook, LeaseKeeper


def ticks(book: LeaseBook, count: int) -> list[str]:
    return [name for _ in range(count) for name in book.tick()]


def test_requests_that_nobody_names_lapse_and_no_others() -> None:
    """Also where their ingress lives, and names others: what it released may not have arrived."""
    book = LeaseBook()
    for name in ("a1", "a2", "b1"):
        book.add(name)
    for _ in range(TICKS_WITHOUT_RENEWAL):
        assert book.tick() == []
        book.renew(["b1", "never here"])
    assert book.tick() == ["a1", "a2"]


def test_what_is_over_does_not_lapse_and_lapses_until_it_is_over() -> None:
    book = LeaseBook()
    book.add("over")
    book.add("open")
    book.remove("over")
    book.remove("never here")
    assert ticks(book, TICKS_WITHOUT_RENEWAL + 2) == ["open", "open"]
    book.remove("open")
    book.renew(["open"])
    assert ticks(book, TICKS_WITHOUT_RENEWAL + 2) == []


class Worker:
    """An actor's handle that writes down what was named, or cannot be reached."""

    def __init__(self, error: Exception | None = None) -> None:
        self.named: list[set[str]] = []
        self.tried = 0
        self.renew = self
        self._error = error

    def remote(self, request_ids: Iterable[str]) -> None:
        self.tried += 1
        if self._error is not None:
            raise self._error
        self.named.append(set(request_ids))


def test_a_keeper_names_what_it_still_wants_whatever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.01)
    keeper, broken, here, there = LeaseKeeper(), Worker(OSError()), Worker(), Worker()
    keeper.hold("broken", broken, "0")
    keeper.hold("here", here, "1")
    keeper.hold("here", here, "2")
    keeper.hold("here", here, "3")
    keeper.hold("there", there, "4")
    keeper.drop("here", "1")
    keeper.drop("there", "4")
    keeper.drop("there", "4")
    deadline = time.monotonic() + 5
    while broken.tried < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    keeper.close()
    assert broken.tried >= 3
    assert here.named[-1] == {"2", "3"}
    assert len(there.named) <= 1
