"""A decode worker and prefill ranks in this process and on CPUs; only Ray is replaced."""

import asyncio
import concurrent.futures
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
from ray.exceptions import RayTaskError

from longreach.cluster.decode.worker import DecodeWorker
from longreach.cluster.prefill.rank import Meeting, PrefillRank
from longreach.cluster.prefill.scheduler import Chunk
from longreach.cluster.settings import Settings
from longreach.engine.decode.decoder import Decoder
from longreach.engine.errors import TransferError
from longreach.engine.kv.destination import Destination
from longreach.engine.messages import GenerationRequest, SamplingParameters, Tokens

from ..conftest import gangs_with, make_settings
from ..decode.test_worker import Answer

SECONDS = 60
CHUNK_TOKENS = 640


def replace_ray(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray's references are futures from here on, and its object store keeps nothing."""

    def wait(futures: list[Future[Any]], timeout: float | None = None) -> tuple[list, list]:
        if timeout:
            concurrent.futures.wait(futures, timeout, concurrent.futures.FIRST_COMPLETED)
        return [f for f in futures if f.done()], [f for f in futures if not f.done()]

    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", lambda future: future.result(SECONDS))
    monkeypatch.setattr(ray, "put", lambda value: value)


def settings_of(transport: str, kept: str) -> Settings:
    """Of one rank. No configuration may ask for CUDA IPC on CPUs."""
    made = make_settings(1)
    sizes = {"sequence_parallel": 1, "kv_cache_tokens": 2560, "chunk_tokens": CHUNK_TOKENS}
    return made.model_copy(
        update={
            "model": made.model.model_copy(update={"kv_cache_dtype": kept}),
            "prefill": gangs_with(made, **sizes),
            "decode": made.decode.model_copy(update={"kv_cache_tokens": 5120}),
            "transport": made.transport.model_copy(update={"kind": transport}),
        }
    )


class Handle:
    """A handle of an actor that lives in this process, as far as ranks use it."""

    def __init__(self, **methods: Callable[..., Any]) -> None:
        for name, method in methods.items():
            setattr(self, name, _Method(method))


class _Method:
    def __init__(self, method: Callable[..., Any]) -> None:
        self.remote = method


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
        self.settings = settings
        self.loop = Loop()
        self.worker = self.another_worker(folder)
        self.rank = self.another_rank()
        self.destinations: dict[str, Destination] = {}

    def another_worker(self, folder: Path) -> DecodeWorker:
        worker = DecodeWorker(self.settings.worker, folder)
        if isinstance(worker._engine, Decoder):
            worker._engine._pool.clear()
        worker._leases.tick = lambda: []  # there is no ingress to renew them

        def called(method: Callable[..., Any]) -> Callable[..., Future[Any]]:
            return lambda *given: self.loop.submit(as_ray(method(*given)))

        handle = Handle(deliver=called(worker.deliver), send_back=called(worker.send_back))
        self.loop.run(worker.start(handle))
        return worker

    def another_rank(self) -> PrefillRank:
        rank = PrefillRank(self.settings.gangs[0])
        rank.join(Meeting.of_one(), 0, 1)
        rank._prefiller._pool.clear()
        return rank

    def reserve(self, name: str, prompt: Tokens, worker: DecodeWorker | None = None) -> None:
        sampling = SamplingParameters(max_tokens=2, temperature=0.0, ignore_eos=True)
        request = GenerationRequest(name, prompt, sampling, 0.0)
        self.destinations[name] = self.loop.run((worker or self.worker).reserve(request))

    def go_on(self, name: str) -> int:
        """Give the gang up; tokens that need not be computed again."""
        self.destinations[name] = self.loop.run(self.worker.go_on(name))
        return self.destinations[name].done

    def compute(
        self,
        name: str,
        prompt: Tokens,
        chunks: range,
        rank: PrefillRank | None = None,
        back: int = 0,
        is_there: bool = False,
    ) -> tuple[np.ndarray | None, str | None]:
        """Some chunks of a prompt, the first `back` of them fetched; the last one's outcome.

        Args:
            is_there: the rank has the request already.
        """
        rank = rank or self.rank
        result = None
        for number in chunks:
            start, end = number * CHUNK_TOKENS, min((number + 1) * CHUNK_TOKENS, len(prompt))
            first = number == chunks.start and not is_there
            is_back = number < chunks.start + back
            turn = Chunk(name, start, end, end == len(prompt), is_back=is_back)
            given = (prompt, self.destinations[name]) if first else (None, None)
            if is_back:
                rank.begin_fetch(turn, *given)
                result = rank.finish_fetch(turn)
            else:
                rank.begin_chunk(turn, *given)
                result = rank.finish_chunk(turn)
        assert result is not None
        return result.logits, result.failure

    def prefill(self, name: str, prompt: Tokens) -> tuple[np.ndarray | None, str | None]:
        """All chunks; the last one's logits, and why pages did not arrive."""
        logits, _ = self.compute(name, prompt, chunks_of(prompt))
        failure = self.rank.flush(name)
        self.rank.release(name)
        return logits, failure

    def answer(
        self, name: str, logits: np.ndarray, worker: DecodeWorker | None = None
    ) -> list[int]:
        async def read() -> list[int]:
            said = Answer()
            await said.read(worker or self.worker, name, logits)
            return [token.token_id for delta in said.deltas for token in delta.tokens]

        return self.loop.run(read())

    def end(self) -> None:
        self.loop.end()


def chunks_of(prompt: Tokens) -> range:
    return range(-(-len(prompt) // CHUNK_TOKENS))


async def as_ray(call: Coroutine[Any, Any, Any]) -> Any:
    """Ray's error for the worker's own."""
    try:
        return await call
    except TransferError as error:
        raise RayTaskError("copy", str(error), error) from error


def make_prompt(length: int) -> Tokens:
    return np.random.default_rng(length).integers(32, 127, length).astype(np.int32)
