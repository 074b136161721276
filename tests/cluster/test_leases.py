"""What an ingress asked for does not outlive it."""

import threading
import time

from longreach.cluster import leases
from longreach.cluster.leases import TICKS_WITHOUT_RENEWAL, LeaseBook, LeaseKeeper


def ticks(book: LeaseBook, count: int) -> list[str]:
    return [name for _ in range(count) for name in book.tick()]


def test_the_requests_of_a_silent_holder_lapse_and_no_others() -> None:
    book = LeaseBook()
    for holder, name in (("a", "a1"), ("a", "a2"), ("b", "b1")):
        book.add(holder, name)
    for _ in range(TICKS_WITHOUT_RENEWAL):
        assert book.tick() == []
        book.renew("b")
    assert book.tick() == ["a1", "a2"]


def test_what_is_over_does_not_lapse_and_lapses_until_it_is_over() -> None:
    book = LeaseBook()
    book.add("a", "over")
    book.add("a", "open")
    book.remove("a", "over")
    book.remove("a", "never here")
    assert ticks(book, TICKS_WITHOUT_RENEWAL + 2) == ["open", "open"]
    book.remove("a", "open")
    assert ticks(book, TICKS_WITHOUT_RENEWAL + 2) == []


def test_a_new_request_is_a_sign_of_life() -> None:
    book = LeaseBook()
    book.add("a", "first")
    assert ticks(book, TICKS_WITHOUT_RENEWAL) == []
    book.add("a", "second")
    assert ticks(book, TICKS_WITHOUT_RENEWAL) == []


def test_a_renewal_of_nothing_leaves_nothing() -> None:
    book = LeaseBook()
    book.renew("unknown")
    assert ticks(book, TICKS_WITHOUT_RENEWAL + 2) == []


class Worker:
    """An actor's handle that writes down who renewed."""

    def __init__(self) -> None:
        self.renewed: list[str] = []
        self.renew = self

    def remote(self, holder: str) -> None:
        self.renewed.append(holder)


def test_a_keeper_renews_where_it_has_requests_and_only_there(monkeypatch) -> None:
    monkeypatch.setattr(leases, "RENEWAL_SECONDS", 0.01)
    keeper, here, there = LeaseKeeper("an ingress"), Worker(), Worker()
    keeper.hold("here", here, "1")
    keeper.hold("here", here, "2")
    keeper.hold("there", there, "3")
    keeper.drop("here", "1")
    keeper.drop("there", "3")
    keeper.drop("there", "3")
    deadline = time.monotonic() + 5
    while len(here.renewed) < 3 and time.monotonic() < deadline:
        time.sleep(0.005)
    keeper.close()
    assert here.renewed[:3] == ["an ingress"] * 3
    assert len(there.renewed) <= 1
    assert threading.active_count() >= 1
