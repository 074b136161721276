"""Pages that the decode worker copies by itself: what is said between it and a prefill rank.

Both are in this process and on CPUs, where the rank's memory is mapped as what it is; only Ray is
replaced. `test_shared_pages.py` has two processes, and a GPU where there is one.
"""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ActorDiedError, RayTaskError

from longreach.cluster.decode.worker import DecodeWorker
from longreach.cluster.prefill.rank import PrefillRank
from longreach.cluster.prefill.scheduler import Chunk
from longreach.cluster.settings import Settings
from longreach.cluster.transports.actor_messages import WorkerDestination
from longreach.cluster.transports.cuda_ipc import CudaIpcMessage, CudaIpcReceiver, CudaIpcSender
from longreach.cluster.transports.shared_pages import SharedPageReader, SharedPool
from longreach.engine.decode.decoder import Decoder
from longreach.engine.errors import TransferError
from longreach.engine.kv.hand_off import Destination, Place
from longreach.engine.kv.pages import HeldPages, Pages
from longreach.engine.local import LocalPrefill
from longreach.engine.messages import GenerationRequest, SamplingParameters
from longreach.engine.model.pocket import CHECKPOINT

from ..conftest import gangs_with, make_settings

SECONDS = 10
PAGES = HeldPages(Pages(torch.zeros(1, 1, 2, 128, 4)), np.array([3]), slice(3, 4))
POOL = SharedPool("pool", "here", (torch.zeros, (1,)), None)


@pytest.fixture(autouse=True)
def answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's references are futures here."""

    def wait(futures: list[Future[Any]], timeout: float | None = None) -> tuple[list, list]:
        if timeout:
            concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_COMPLETED)
        return [f for f in futures if f.done()], [f for f in futures if not f.done()]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda future: future.result(SECONDS))


class Handle:
    """An actor's handle with one method, `deliver`."""

    def __init__(self, deliver: Callable[..., Future[None]]) -> None:
        self.deliver = self
        self.remote = deliver


class Letters:
    """What a sender says, each answered when the test says so."""

    def __init__(self) -> None:
        self.runs: list[list[int]] = []
        self.answers: list[Future[None]] = []

    def take(self, request_id: str, message: CudaIpcMessage) -> Future[None]:
        pool, runs = message
        assert (request_id, pool) == ("a", POOL)
        self.runs.append([run.place.layer for run in runs])
        self.answers.append(Future())
        return self.answers[-1]


def test_what_comes_while_a_message_is_under_way_goes_with_the_next() -> None:
    letters = Letters()
    sender = CudaIpcSender(POOL).open(WorkerDestination("a", Handle(letters.take)))
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
    sender = CudaIpcSender(POOL).open(WorkerDestination("a", Handle(letters.take)))
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
    """Of one rank. No configuration may ask for CUDA IPC on CPUs."""
    made = make_settings(1)
    sizes = {"sequence_parallel": 1, "kv_cache_tokens": 2560}
    return made.model_copy(
        update={
            "model": made.model.model_copy(update={"kv_cache_dtype": request.param}),
            "prefill": gangs_with(made, **sizes),
            "decode": made.decode.model_copy(update={"kv_cache_tokens": 5120}),
            "transport": made.transport.model_copy(update={"kind": "cuda_ipc"}),
        }
    )


class Loop:
    """An event loop on a thread, as an asynchronous actor has one."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()

    def submit(self, call: Coroutine[Any, Any, Any]) -> Future[Any]:
        return asyncio.run_coroutine_threadsafe(call, self._loop)

    def run(self, call: Coroutine[Any, Any, Any]) -> Any:
        return self.submit(call).result(SECONDS)

    def end(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(SECONDS)


class Pair:
    """A decode worker, and a prefill rank that hands off to it."""

    def __init__(self, settings: Settings, folder: Path) -> None:
        self.loop = Loop()
        self.worker = DecodeWorker(settings.worker, folder)
        assert isinstance(self.worker._engine, Decoder)
        self.worker._engine._pool.clear()
        self.rank = PrefillRank(settings.gangs[0], 0)
        self.rank.join(("", 0), 1)
        handle = Handle(lambda *given: self.loop.submit(as_ray(self.worker.deliver(*given))))
        self.loop.run(self.worker.start(handle))
        self._destinations: dict[str, Destination] = {}

    def reserve(self, name: str, prompt: np.ndarray) -> None:
        sampling = SamplingParameters(max_tokens=2, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(name, prompt, sampling, 0.0)
        self._destinations[name] = self.loop.run(self.worker.reserve(request))

    def prefill(
        self, name: str, prompt: np.ndarray, chunk: int = 640
    ) -> tuple[np.ndarray | None, str | None]:
        """In chunks; the last one's logits, and why pages did not arrive."""
        result = None
        for start in range(0, len(prompt), chunk):
            end = min(start + chunk, len(prompt))
            whole = prompt if start == 0 else None
            turn = Chunk(name, start, end, end == len(prompt))
            self.rank.begin_chunk(turn, whole, None if start else self._destinations[name])
            result = self.rank.finish_chunk(turn)
        assert result is not None
        failure = self.rank.flush(name)
        self.rank.release(name)
        return result.logits, failure

    def answer(self, name: str, logits: np.ndarray) -> list[int]:
        async def read() -> list[int]:
            return [
                token.token_id
                async for deltas, _ in self.worker.answer(name, logits)
                for delta in deltas
                for token in delta.tokens
            ]

        return self.loop.run(read())

    def end(self) -> None:
        self.loop.end()


async def as_ray(call: Coroutine[Any, Any, None]) -> None:
    """Ray's error for the worker's own."""
    try:
        await call
    except TransferError as error:
        raise RayTaskError("copy", str(error), error) from error


@pytest.fixture
def pair(settings: Settings, tmp_path: Path) -> Iterator[Pair]:
    made = Pair(settings, tmp_path)
    yield made
    made.end()


def reader_of(pair: Pair) -> SharedPageReader:
    assert isinstance(pair.worker._receiver, CudaIpcReceiver)
    return pair.worker._receiver._reader


def make_prompt(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(32, 127, length).astype(np.int32)


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
    receive = reader_of(pair)._receive

    def slowly(*given: Any) -> None:
        begun.set()
        assert let.wait(SECONDS)
        receive(*given)

    monkeypatch.setattr(reader_of(pair), "_receive", slowly)
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
