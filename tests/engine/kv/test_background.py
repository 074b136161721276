"""What is handed off beside the computing arrives in order, or its failure is known."""

import threading
from collections.abc import Sequence
from typing import cast
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from longreach.engine.errors import LeftMeshError, TransferError
from longreach.engine.kv.background import BackgroundHandOff, hand_off_stream
from longreach.engine.kv.hand_off import HandOff, Place
from longreach.engine.kv.pages import HeldPages, Pages
from longreach.engine.parallel.mesh import Mesh

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
    sender = BackgroundHandOff(slow, None, Mesh.single)
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
    sender = BackgroundHandOff(slow, None, Mesh.single)
    push(sender, range(1))
    with pytest.raises(TransferError):
        sender.flush()
    sender.abandon()


def test_what_waits_is_dropped_when_a_request_is_given_up() -> None:
    slow = SlowHandOff()
    sender = BackgroundHandOff(slow, None, Mesh.single)
    push(sender, range(5))
    assert slow.begun.wait(10)
    sender.abandon()
    slow.let.set()
    assert slow.given_up.wait(10)
    assert slow.asked == [0, "abandon"]


def test_what_is_fetched_comes_after_what_was_pushed_and_is_waited_for() -> None:
    slow = SlowHandOff()
    sender = BackgroundHandOff(slow, None, Mesh.single)
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
    sender = BackgroundHandOff(slow, None, Mesh.single)
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
    sender = BackgroundHandOff(slow, None, Mesh.single)
    push(sender, range(3))
    with pytest.raises(TransferError):
        sender.flush()
    assert sender.failure is not None
    assert "\n" not in sender.failure
    assert slow.asked == [0, "flush"]
    sender.abandon()


class FakeEvent:
    """Happens when a test says so."""

    made: "list[FakeEvent]"

    def __init__(self, blocking: bool) -> None:
        assert blocking
        self.happened = threading.Event()
        FakeEvent.made.append(self)

    def record(self, stream: object) -> None: ...

    def query(self) -> bool:
        return self.happened.is_set()

    def synchronize(self) -> None:
        assert self.happened.wait(10)


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[FakeEvent]:
    """One for each push, in their order, as if pages lay on a GPU."""
    FakeEvent.made = []
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "set_stream", Mock())
    return FakeEvent.made


class Parting:
    """A hand-off of pages that are computed in a mesh, which is left while one is sent slowly."""

    def __init__(self, pages: int) -> None:
        self.slow, self.mesh = SlowHandOff(), Mesh.single()
        self.sender = BackgroundHandOff(
            self.slow, cast(torch.cuda.Stream, Mock()), lambda: self.mesh
        )
        push(self.sender, range(pages))

    def leave(self) -> None:
        self.sender.before_leaving()
        self.mesh.leave()


def test_pages_that_were_not_written_when_the_mesh_was_left_are_not_sent(
    events: list[FakeEvent],
) -> None:
    """What was launched runs all the same, behind a collective that was given up."""
    parting = Parting(4)
    events[0].happened.set()
    events[1].happened.set()
    assert parting.slow.begun.wait(10)
    parting.leave()
    events[2].happened.set()
    events[3].happened.set()
    parting.slow.let.set()
    with pytest.raises(LeftMeshError):
        parting.sender.flush()
    assert parting.slow.asked == [0, 1, "flush"]
    assert parting.sender.failure is None, "the decode worker takes pages"
    parting.sender.abandon()


def test_pages_that_were_pushed_while_the_mesh_was_left_are_not_sent(
    events: list[FakeEvent],
) -> None:
    parting = Parting(0)
    parting.sender.before_leaving()
    push(parting.sender, range(1))
    parting.mesh.leave()
    push(parting.sender, range(1, 2))
    events[1].happened.set()
    parting.sender.before_leaving()
    events[0].happened.set()
    parting.slow.let.set()
    with pytest.raises(LeftMeshError):
        parting.sender.flush()
    assert parting.slow.asked == ["flush"]
    parting.sender.abandon()


def test_what_waits_to_be_sent_between_two_chunks_is_sent_whatever_mesh_comes_next(
    events: list[FakeEvent],
) -> None:
    """Ranks that come later join there, and nobody's prompt is interrupted."""
    parting = Parting(3)
    for event in events:
        event.happened.set()
    parting.leave()
    parting.mesh = Mesh.single()
    push(parting.sender, range(3, 4))
    events[3].happened.set()
    parting.slow.let.set()
    parting.sender.flush()
    assert parting.slow.asked == [0, 1, 2, 3, "flush"]
    parting.sender.abandon()


def test_on_a_cpu_pages_are_whole_when_they_are_pushed() -> None:
    parting = Parting(0)
    parting.sender = BackgroundHandOff(parting.slow, None, lambda: parting.mesh)
    push(parting.sender, range(2))
    parting.leave()
    parting.slow.let.set()
    parting.sender.flush()
    assert parting.slow.asked == [0, 1, "flush"]
    parting.sender.abandon()


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
        sender = BackgroundHandOff(Reader(), stream, Mesh.single)
        sender.push(Place(0, 0, 0), apart)
        sender.flush()
        sender.abandon()
        reserved.append(torch.cuda.memory_reserved(device))
    assert reserved[-1] == reserved[0]
