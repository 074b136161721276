"""A prefill replica: the coordinator of one gang, which shares it among prompts chunk by chunk."""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import ActorUnavailableError, RayError

from ...engine.errors import LongreachError, OutOfMemoryError, TransferError, UnavailableError
from ...engine.messages import GenerationRequest, Prefilled, Progress
from .. import metrics
from ..failures import as_ours
from ..metrics import Metrics
from ..outbox import detached
from ..settings import PAGE_TOKENS, GangSettings
from .gang import Gang
from .rank import RankResult
from .scheduler import Chunk, ChunkScheduler

logger = logging.getLogger(__name__)

_PING_SECONDS = 10
_LOST = "a rank of the prefill gang died, and the gang is being replaced; send the request again"


@dataclass(eq=False)
class _Job:
    """One prompt under way; `events` ends with Prefilled or an error."""

    prompt: ray.ObjectRef
    request: GenerationRequest
    worker: Any
    events: "asyncio.Queue[Progress | Prefilled | LongreachError]"
    began: float = 0.0
    stages: dict[str, float] = field(default_factory=dict)

    @property
    def total(self) -> int:
        """Tokens of the prompt."""
        return len(self.request.prompt)


class PrefillReplica:
    """A Serve deployment. Its gang lives and dies with it."""

    async def __init__(self, settings: GangSettings, metrics_directory: Path) -> None:
        prefill = settings.prefill
        self._sink = Metrics(metrics_directory, "prefill", settings.model.name, prefill.name)
        self._scheduler = ChunkScheduler(
            prefill.chunk_tokens, -(-prefill.kv_cache_tokens // PAGE_TOKENS), prefill.patience
        )
        self._jobs: dict[str, _Job] = {}
        self._computing: str | None = None
        self._leaving: list[str] = []
        self._wake = asyncio.Event()
        self._lost = False
        self._gang = await Gang.start(settings)
        self._loop = detached(self._run())
        self._report()

    async def check_health(self) -> None:
        """Raise if a rank is gone: Serve then replaces this replica, and the gang with it."""
        if not self._lost and self._computing is None:
            try:
                await asyncio.wait_for(self._gang.ping(), _PING_SECONDS)
            except ActorUnavailableError as error:
                # A connection broke, and Ray is making another: no rank has died.
                logger.warning("a rank could not be reached for a while: %s", error)
            except (RayError, TimeoutError) as error:
                # A chunk that began meanwhile may keep the ranks from answering, and finds out.
                if isinstance(error, RayError) or self._computing is None:
                    self._lose(error)
        if self._lost:
            raise UnavailableError(_LOST)

    async def prefill(
        self, request: GenerationRequest, worker: Any
    ) -> AsyncGenerator[Progress | Prefilled | None, None]:
        """Compute a prompt into pages of a decode worker, which are reserved here.

        Yields None at once, Progress after every chunk but the last, then Prefilled. Leaving early
        stops the work after the chunk that is being computed.

        While a request waits for pages it is under way here already: replicas that are asked to
        stop finish what they have, so this one stays until it is done.

        Args:
            worker: the decode worker's actor handle.
        """
        if self._lost:
            raise UnavailableError(_LOST)
        job = _Job(ray.put(request.prompt), request, worker, asyncio.Queue())
        self._jobs[request.request_id] = job
        watch = detached(self._watch(job))
        try:
            yield None
            while True:
                event = await job.events.get()
                if isinstance(event, LongreachError):
                    raise event
                yield event
                if isinstance(event, Prefilled):
                    return
        finally:
            watch.cancel()
            self._forget(request.request_id)

    async def _watch(self, job: _Job) -> None:
        """Let a request's turn come once it has pages, and end it with the decode worker's word.

        Serve's own cancellation is best effort, and leaves a generator that nobody reads as it is.
        """
        name = job.request.request_id
        try:
            await job.worker.reserve.remote(job.request)
            self._scheduler.add(name, job.total)
            self._wake.set()
            self._report()
            await job.worker.gone.remote(name)
            ended: LongreachError = UnavailableError("the request was released")
        except (RayError, LongreachError) as error:
            ended = as_ours(error)
        job.events.put_nowait(ended)
        self._forget(name)

    def _forget(self, request_id: str) -> None:
        """Have a prompt's pages given back, after its chunk if one is being computed.

        The loop does it: a request that is being cancelled would take its calls to ranks with it,
        and these would wait for them ever after.
        """
        self._jobs.pop(request_id, None)
        self._leaving.append(request_id)
        self._wake.set()

    def _release_leaving(self) -> None:
        # Ranks get calls in order, so their pages are free before they are taken again.
        leaving, self._leaving = self._leaving, []
        for request_id in dict.fromkeys(leaving):
            self._gang.release(request_id)
            self._scheduler.remove(request_id)
        if leaving:
            self._report()

    async def _run(self) -> None:
        try:
            while not self._lost:
                await self._run_next()
        except Exception as error:
            self._lose(error)

    async def _run_next(self) -> None:
        """Compute the chunk whose turn it is, or sleep until there is one."""
        self._release_leaving()
        chunk = self._scheduler.next()
        if chunk is None:
            self._wake.clear()
            await self._wake.wait()
            return
        self._computing = chunk.request_id
        try:
            await self._compute(chunk)
        finally:
            self._computing = None

    async def _compute(self, chunk: Chunk) -> None:
        job = self._jobs[chunk.request_id]
        first = chunk.start == 0
        if first:
            job.began = time.time()
        self._report()
        try:
            results = await self._gang.run_chunk(chunk, job.prompt if first else None, job.worker)
        except RayError as error:
            self._out_of_memory(chunk, error)
            return
        self._count(chunk, results)
        slowest = max(results, key=_busy_seconds)
        for stage, seconds in slowest.stages.items():
            job.stages[stage] = job.stages.get(stage, 0.0) + seconds
        failure = next((r.failure for r in results if r.failure is not None), None)
        if failure is not None:
            self._end(chunk.request_id, TransferError(failure))
            return
        done = _prefilled(job, results) if chunk.is_last else Progress(chunk.end, job.total)
        job.events.put_nowait(done)

    def _out_of_memory(self, chunk: Chunk, error: RayError) -> None:
        """End the one request that needed too much; raise if the gang cannot go on."""
        ours = as_ours(error)
        if not isinstance(ours, OutOfMemoryError):
            raise error
        self._end(chunk.request_id, ours)
        if self._gang.num_ranks > 1:
            # The others wait for this rank in a collective, and nothing calls them back.
            raise error

    def _end(self, request_id: str, error: LongreachError) -> None:
        """Forget a prompt here and now: its next chunk's turn may come before anyone reads this."""
        job = self._jobs.get(request_id)
        if job is not None:
            job.events.put_nowait(error)
            self._forget(request_id)

    def _count(self, chunk: Chunk, results: list[RankResult]) -> None:
        self._sink.add(metrics.PREFILL_CHUNKS)
        self._sink.add(metrics.PREFILL_TOKENS, chunk.end - chunk.start)
        busy = sorted(_busy_seconds(result) for result in results)
        self._sink.observe(metrics.RANK_SKEW, busy[-1] - busy[0])
        for stage, seconds in max(results, key=_busy_seconds).stages.items():
            self._sink.add(metrics.PREFILL_STAGE_SECONDS, seconds, stage=stage)

    def _lose(self, error: BaseException) -> None:
        """The gang cannot go on: tell everybody who waits for it, and end what is left of it."""
        if self._lost:
            return
        logger.error("the prefill gang is lost", exc_info=error)
        self._lost = True
        self._wake.set()
        for job in self._jobs.values():
            job.events.put_nowait(UnavailableError(_LOST))
        self._gang.kill()

    def _report(self) -> None:
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._scheduler.num_running)
        self._sink.set(metrics.NUM_REQUESTS_WAITING, self._scheduler.num_waiting)
        self._sink.set(metrics.KV_CACHE_USAGE, self._scheduler.usage)


def _prefilled(job: _Job, results: list[RankResult]) -> Prefilled:
    logits = next(result.logits for result in results if result.logits is not None)
    hand_off = max(result.hand_off for result in results)
    return Prefilled(
        logits=logits,
        queued=max(job.began - job.request.arrived, 0.0),
        prefill=max(time.time() - job.began - hand_off, 0.0),
        hand_off=hand_off,
        stages=job.stages,
    )


def _busy_seconds(result: RankResult) -> float:
    """Time spent on a chunk without what was spent waiting for other ranks."""
    return sum(s for stage, s in result.stages.items() if stage != "communication")
