"""What is handed off beside the computing arrives in order, or its failure is known."""

import threading
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from longreach.engine.errors import TransferError
from longreach.engine.kv.background import BackgroundHandOff, hand_off_stream
from longreach.engine.kv.hand_off import HandOff, Place
from longreach.engine.kv.pages import HeldPages, Pages

PAGES = HeldPages(Pages(torch.zeros(1, 1, 2, 128, 4)), np.array([0]), slice(0, 1))


class SlowHandOff(HandOff):
    """Sends when it is let, and writes down what it is asked."""

    def __init__(self, error: Exception | None = None) -> None:
        self.asked: list[int | str] = []
        self.begun, self.let = threading.Event(), threading.Event()
        self.given_up = threading.Event()
        self._error = error

    def push(self, place: Place, pages: HeldPages) -> None:
        self.begun.set()
        assert self.let.wait(10)
        self.asked.append(place.layer)
        if self._error is not None:
            raise self._error

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        self.begun.set()
        assert self.let.wait(10)
        self.asked += [f"fetch {place.layer}" for place, _ in wanted]
        if self._error is not None:
            raise self._error

    def flush(self) -> None:
        self.asked.append("flush")

    def abandon(self) -> None:
        self.asked.append("abandon")
        self.given_up.set()


def push(sender: BackgroundHandOff, layers: range) -> None:
    for layer in layers:
        sender.push(Place(layer, 0, 0), PAGES)


def test_pushes_do_not_wait_and_a_flush_waits_for_all_of_them() -> None:
    slow = SlowHandOff()
    sender = BackgroundHandOff(slow, None)
    push(sender, range(5))
    assert slow.asked == []
    threading.Timer(0.05, slow.let.set).start()
    sender.flush()
    assert slow.asked == [0, 1, 2, 3, 4, "flush"]
    push(sender, range(5, 6))
    sender.flush()
    assert slow.asked[6:] == [5, "flush"]
    sender.abandon()


def test_a_flush_that_fails_unforeseen_ends_one_request(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = SlowHandOff()
    slow.let.set()

    def broken() -> None:
        raise ValueError("what nobody foresaw")

    monkeypatch.setattr(slow, "flush", broken)
    sender = BackgroundHandOff(slow, None)
    push(sender, range(1))
    with pytest.raises(TransferError):
        sender.flush()
    sender.abandon()


def test_what_waits_is_dropped_when_a_request_is_given_up() -> None:
    slow = SlowHandOff()
    sender = BackgroundHandOff(slow, None)
    push(sender, range(5))
    assert slow.begun.wait(10)
    sender.abandon()
    slow.let.set()
    assert slow.given_up.wait(10)
    assert slow.asked == [0, "abandon"]


def test_what_is_fetched_comes_after_what_was_pushed_and_is_waited_for() -> None:
    slow = SlowHandOff()
    sender = BackgroundHandOff(slow, None)
    push(sender, range(2))
    threading.Timer(0.05, slow.let.set).start()
    sender.fetch([(Place(7, 0, 0), PAGES)])
    assert slow.asked == [0, 1, "fetch 7"]
    assert sender.failure is None
    sender.abandon()


def test_a_fetch_that_fails_is_remembered_and_not_raised() -> None:
    """A rank that left a chunk half-way would leave the others waiting for it."""
    slow = SlowHandOff(RuntimeError("the device is gone"))
    slow.let.set()
    sender = BackgroundHandOff(slow, None)
    sender.fetch([(Place(0, 0, 0), PAGES)])
    assert sender.failure is not None
    sender.fetch([(Place(1, 0, 0), PAGES)])
    assert slow.asked == ["fetch 0"]
    with pytest.raises(TransferError):
        sender.flush()
    sender.abandon()


def test_an_error_that_nobody_expected_fails_the_hand_off() -> None:
    slow = SlowHandOff(RuntimeError("the device is gone\nCompile with ..."))
    slow.let.set()
    sender = BackgroundHandOff(slow, None)
    push(sender, range(3))
    with pytest.raises(TransferError):
        sender.flush()
    assert sender.failure is not None
    assert "\n" not in sender.failure
    assert slow.asked == [0, "flush"]
    sender.abandon()


class Reader(HandOff):
    """Takes memory for pages on their way, as they do not lie side by side."""

    def push(self, place: Place, pages: HeldPages) -> None:
        pages.read()

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None: ...
    def flush(self) -> None: ...
    def abandon(self) -> None: ...


@pytest.mark.skipif(not torch.cuda.is_available(), reason="only a GPU has streams")
def test_memory_that_one_request_took_serves_all_that_follow() -> None:
    device = torch.device("cuda")
    stream, numbers = hand_off_stream(device), np.array([5, 2, 9])
    layer = Pages(torch.zeros(64, 8, 2, 128, 128, device=device))
    apart = HeldPages(layer, numbers, torch.from_numpy(numbers).to(device))
    reserved = []
    for _ in range(8):
        sender = BackgroundHandOff(Reader(), stream)
        sender.push(Place(0, 0, 0), apart)
        sender.flush()
        sender.abandon()
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[-1] == reserved[0]
