"""Pages that the decode worker copies by itself: what is said between it and a prefill rank.

Both are in this process and on CPUs, where the rank's memory is mapped as what it is; only Ray is
replaced. `test_shared_pages.py` has two processes, and a GPU where there is one.
"""

import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ray.exceptions import ActorDiedError

from longreach.cluster.messages import WorkerDestination
from longreach.cluster.settings import Settings
from longreach.cluster.transports.announced import Announcement
from longreach.cluster.transports.cuda_ipc import CudaIpcReceiver, CudaIpcSender
from longreach.cluster.transports.shared_pages import SharedPageReader, SharedPool
from longreach.engine.errors import TransferError
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages, Pages
from longreach.engine.local import LocalPrefill
from longreach.engine.model.pocket import CHECKPOINT

from .pair import SECONDS, Handle, Pair, make_prompt, replace_ray, settings_of

PAGES = HeldPages(Pages(torch.zeros(1, 1, 2, 128, 4)), np.array([3]), slice(3, 4))
POOL = SharedPool("pool", "here", ((torch.zeros, (1,)),), ())


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's references are futures here."""
    replace_ray(monkeypatch)


class Letters:
    """What a sender says, each answered when the test says so."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.answers: list[Future[None]] = []

    def take(self, request_id: str, epoch: int, message: Announcement) -> Future[None]:
        pool, runs = message
        assert (request_id, pool) == ("a", POOL)
        self.runs.append([run.place.layer for run in runs])
        self.answers.append(Future())
        return self.answers[-1]


def test_what_comes_while_a_message_is_under_way_goes_with_the_next() -> None:
    letters = Letters()
    sender = CudaIpcSender(POOL).open(WorkerDestination("a", 0, Handle(deliver=letters.take), 0))
    for layer in range(4):
        sender.push(Place(layer, 0, 0), PAGES)
    assert letters.runs == [[0]]
    letters.answers[0].set_result(None)
    sender.push(Place(4, 0, 0), PAGES)
    sender.push(Place(5, 0, 0), PAGES)
    assert letters.runs == [[0], [1, 2, 3, 4]]
    flushing = threading.Thread(target=sender.flush)
    flushing.start()
    letters.answers[1].set_result(None)
    while len(letters.answers) < 3:
        assert flushing.is_alive()
    assert letters.runs[2:] == [[5]]
    flushing.join(0.1)
    assert flushing.is_alive(), "pages may not be overwritten before they have been copied"
    letters.answers[2].set_result(None)
    flushing.join(SECONDS)
    assert not flushing.is_alive()
    assert sender.failure is None


def test_a_dead_decode_worker_is_remembered_and_not_raised_by_push() -> None:
    letters = Letters()
    sender = CudaIpcSender(POOL).open(WorkerDestination("a", 0, Handle(deliver=letters.take), 0))
    sender.push(Place(0, 0, 0), PAGES)
    letters.answers[0].set_exception(ActorDiedError())
    sender.push(Place(1, 0, 0), PAGES)
    sender.push(Place(2, 0, 0), PAGES)
    assert letters.runs == [[0]]
    assert sender.failure is not None
    with pytest.raises(TransferError):
        sender.flush()


@pytest.fixture(params=["auto", "fp8_e4m3"])
def settings(request: pytest.FixtureRequest) -> Settings:
    return settings_of("cuda_ipc", request.param)


@pytest.fixture
def pair(settings: Settings, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(settings, tmp_path)
    yield made
    made.end()


def reader_of(pair: Pair) -> SharedPageReader:
    assert isinstance(pair.worker._receiver, CudaIpcReceiver)
    return pair.worker._receiver._reader


def test_a_prompt_goes_on_from_pages_that_were_copied(pair: Pair, settings: Settings) -> None:
    """Its second token is the one that prefilling the first would have brought.

    Pages of both pools lie in pieces: other requests hold some in between, or came and went.
    """
    kept = settings.model.kv_cache_dtype
    local = LocalPrefill(CHECKPOINT, max_tokens=2048, kv_cache_dtype=kept)
    for name, length in (("first", 300), ("second", 1500), ("third", 1801)):
        prompt = make_prompt(length)
        pair.reserve(f"before {name}", make_prompt(100))
        pair.reserve(name, prompt)
        logits, failure = pair.prefill(name, prompt)
        assert failure is None
        assert logits is not None
        tokens = pair.answer(name, logits)
        text = prompt
        for token in tokens:
            assert token == int(local.logits(text).argmax())
            text = np.append(text, np.int32(token))
        pair.loop.run(pair.worker.release(name))
    assert not reader_of(pair)._mapped


def test_pages_of_a_released_request_go_back_only_after_the_copy(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, let = threading.Event(), threading.Event()
    put = reader_of(pair)._put

    def slowly(*given: Any) -> None:
        begun.set()
        assert let.wait(SECONDS)
        put(*given)

    monkeypatch.setattr(reader_of(pair), "_put", slowly)
    prompt = make_prompt(300)
    pair.reserve("a", prompt)
    prefilling = threading.Thread(target=pair.prefill, args=("a", prompt))
    prefilling.start()
    assert begun.wait(SECONDS)
    releasing = pair.loop.submit(pair.worker.release("a"))
    with pytest.raises(TimeoutError):
        releasing.result(0.2)
    assert pair.worker._engine.usage > 0
    # Those who wait for the request's end need not wait for the copy.
    pair.loop.run(pair.worker.until_released("a"))
    let.set()
    releasing.result(SECONDS)
    assert pair.worker._engine.usage == 0
    prefilling.join(SECONDS)
    assert not prefilling.is_alive()


def test_a_request_that_was_released_takes_no_pages_and_the_rank_goes_on(pair: Pair) -> None:
    prompt = make_prompt(300)
    pair.reserve("a", prompt)
    pair.loop.run(pair.worker.release("a"))
    _, failure = pair.prefill("a", prompt)
    assert failure is not None
    assert "it was cancelled" in failure
    pair.reserve("b", prompt)
    assert pair.prefill("b", prompt)[1] is None


def test_a_rank_of_another_host_fails_requests_with_the_mend(pair: Pair) -> None:
    prompt = make_prompt(300)
    reader_of(pair)._host = "elsewhere"
    pair.reserve("a", prompt)
    _, failure = pair.prefill("a", prompt)
    assert failure is not None
    assert "set transport.kind: object_store" in failure
