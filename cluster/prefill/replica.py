"""A prefill replica: the coordinator of one gang, which computes several prompts chunk by chunk."""

import asyncio
import itertools
import logging
import time
from asyncio import FIRST_COMPLETED
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import ray
from ray.exceptions import RayError

from ...engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    OutOfMemoryError,
    TransferError,
    UnavailableError,
)
from ...engine.messages import Prefilled, Progress
from ...kernels.page_size import pages_for
from .. import metrics
from ..call_errors import as_ours
from ..messages import PrefillOrder, Standing
from ..metrics import Metrics, ProcessFigures
from ..nodes import metrics_of_node
from ..recovery import RECOVERY_SECONDS
from ..settings import GangSettings, HandOffTerms
from ..streams import beating
from ..tasks import detached, forever
from .gang import Gang, OfPrompt
from .rank import RankResult
from .regrouping import Regrouping
from .scheduler import Chunk, ChunkScheduler
from .speed import Speed

if TYPE_CHECKING:
    from ...engine.kv.destination import Destination

logger = logging.getLogger(__name__)

_LOST = "a rank of the prefill gang is lost, and the gang is being replaced; send the request again"
_OTHER = "the gang has other settings than who asks it; send the request again"
_GOES_ON = "a rank of the prefill gang is lost, and the others go on; send the request again"


@dataclass(eq=False)
class _Job:
    """One prompt under way; `events` ends with Prefilled or an error.

    `began`: when its first chunk did. From then on the ranks hold pages of it, also after its end,
    until its request is over or somebody else needs them. `finishing` ends when all its chunks that
    were begun have: until then nobody knows which of its pages are whole. `forgotten` is done when
    they are nobody's any more.
    """

    order: PrefillOrder
    prompt: ray.ObjectRef
    events: "asyncio.Queue[Progress | Prefilled | LongreachError]"
    began: float | None = None
    finishing: "asyncio.Task[None] | None" = None
    forgotten: "asyncio.Future[None]" = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    stages: dict[str, float] = field(default_factory=dict)
    scores: list[npt.NDArray[np.float32]] = field(default_factory=list)

    def forget(self) -> None:
        """Nobody can go on with its pages from here on."""
        if not self.forgotten.done():
            self.forgotten.set_result(None)

    async def heard(self) -> AsyncGenerator[Progress | Prefilled, None]:
        """Its events, to the last."""
        while True:
            event = await self.events.get()
            if isinstance(event, LongreachError):
                raise event
            yield event
            if isinstance(event, Prefilled):
                return

    def note_stages(self, results: "list[RankResult]") -> None:
        """Count the time of the rank that took longest over a chunk."""
        for stage, seconds in max(results, key=_busy_seconds).stages.items():
            self.stages[stage] = self.stages.get(stage, 0.0) + seconds

    @property
    def name(self) -> str:
        """What ranks and scheduler know it by."""
        return self.order.name

    @property
    def origin(self) -> str:
        """What all attempts at the request have in common."""
        return self.order.request.origin

    @property
    def total(self) -> int:
        """Tokens of the prompt."""
        return len(self.order.request.prompt)

    @property
    def for_ranks(self) -> OfPrompt:
        """What ranks need to know of it."""
        return OfPrompt(self.prompt, self.order.destination)


class PrefillReplica:
    """A Serve deployment. Its gang lives and dies with it."""

    async def __init__(self, settings: GangSettings, metrics_directory: Path) -> None:
        prefill = settings.prefill
        folder = metrics_of_node(metrics_directory)
        self._sink = Metrics(folder, "prefill", settings.model.name, prefill.name)
        ProcessFigures(self._sink).start()
        # A rate misses what a series begins with: so it begins with nothing.
        for metric in (metrics.LOST, metrics.HANDOFF_FAILURES, metrics.PREFILL_TOKENS_AGAIN):
            self._sink.add(metric, 0)
        self._scheduler = ChunkScheduler(
            prefill.chunk_tokens, pages_for(prefill.kv_cache_tokens), prefill.patience
        )
        self._jobs: dict[str, _Job] = {}
        self._left: dict[str, _Job] = {}  # by their origin
        self._leaving: list[str] = []
        self._following: set[asyncio.Task[None]] = set()
        self._handing_off: set[asyncio.Task[None]] = set()
        self._finishing: asyncio.Task[None] | None = None
        self._wake = asyncio.Event()
        self._lost = False
        self._terms = settings.terms
        self._speed = Speed()
        self._gang = await Gang.start(settings, metrics_directory)
        self._regrouping = Regrouping(
            self._gang, lambda: bool(self._jobs), lambda: self._finishing, self._begin_again
        )
        self._loop = forever(self._run(), self._lose)
        self._watch = forever(self._regrouping.run(), self._lose)
        self._report()

    async def check_health(self) -> None:
        """Raise if a rank is lost: Serve then replaces this replica, and the gang with it."""
        if self._lost:
            raise UnavailableError(_LOST)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """What `autoscaling.GangLoad` is made of; Serve asks by this name."""
        return self._speed.load(self._scheduler.tokens_to_go)

    async def standing(self, names: list[str], terms: HandOffTerms) -> Standing:
        """How this gang stands to orders of those names and terms."""
        takes_others = terms == self._terms and not self._lost
        return Standing(frozenset(names) & self._jobs.keys(), takes_others)

    async def prefill(
        self, order: PrefillOrder
    ) -> AsyncGenerator[Progress | Prefilled | None, None]:
        """Compute a prompt into the pages that a decode worker allocates for it.

        Yields None at once, Progress after every chunk but the last, then Prefilled; and None again
        and again in between, to say that the replica is there. Leaving early stops the work after
        the chunk that is being computed.
        """
        if self._lost:
            raise NotUpError(_LOST)
        if order.terms != self._terms:
            raise NotUpError(_OTHER)
        job = _Job(order, ray.put(order.request.prompt), asyncio.Queue())
        self._jobs[job.name] = job
        following = detached(self._follow(job))
        self._following.add(following)
        following.add_done_callback(self._following.discard)
        try:
            yield None
            async with aclosing(beating(job.heard(), beat=None)) as events:
                async for event in events:
                    yield event
        finally:
            self._leave(job)

    async def _follow(self, job: _Job) -> None:
        """Let a request's turn come once it has pages, and end it with the decode worker's word.

        Serve's own cancellation is best effort, and leaves a generator that nobody reads as it is.
        """
        try:
            destination = await job.order.destination
            await self._end_earlier(job, destination)
            if job.name in self._jobs:
                self._admit(job, destination)
            await job.order.released
        except (Exception, asyncio.CancelledError) as raised:
            # Whatever it was: a request whose client has left is gone already, any other is told.
            error = as_ours(raised)
            self._end(job, error)
            if isinstance(error, LostError):
                # The request comes again, if it can, and has not lost its pages here.
                await asyncio.sleep(RECOVERY_SECONDS)
        self._end(job, UnavailableError("the request was released"))
        self._forget(job)

    async def _end_earlier(self, job: _Job, destination: "Destination") -> None:
        """End earlier attempts at a prompt's request; returns when it is known what they left.

        A chunk that is under way may fail yet, or its pages not come. A later attempt goes on
        behind what is known to be whole, and hands nothing else off: its decode worker would count
        that as there. Of what it does not go on with, it waits for nothing: a fetch from a worker
        that has died takes as long to fail as Ray to find that.
        """
        await self._regrouping.may_begin()
        while job.name in self._jobs:
            earlier = itertools.takewhile(lambda other: other is not job, self._jobs.values())
            for other in [each for each in earlier if each.origin == job.origin]:
                # Whoever asked for it is gone, and this replica does not know yet.
                self._end(other, UnavailableError("the request was begun again"))
            before = self._left.get(job.origin)
            if before is None or before.finishing is None or before.finishing.done():
                return
            is_fetching = self._scheduler.is_fetching(before.name)
            if is_fetching and not self._left_to(job, before, destination):
                self._forget(before)
                return
            await asyncio.wait({before.finishing, before.forgotten}, return_when=FIRST_COMPLETED)
            await self._regrouping.may_begin()

    def _admit(self, job: _Job, destination: "Destination") -> None:
        """Let a prompt's turn come, behind what need not be computed once more."""
        before = self._left.get(job.origin)
        done = 0 if before is None else self._left_to(job, before, destination)
        if before is not None and done:
            self._go_on(job, before, done)
        else:
            scored = job.order.request.sampling.prompt_logprobs
            self._scheduler.add(job.name, job.total, scored, destination.done)
        self._wake.set()
        self._report()

    def _left_to(self, job: _Job, before: _Job, destination: "Destination") -> int:
        """Tokens that a prompt can go on behind with what an earlier attempt left.

        0 where it does not help: nothing lies here, or more comes back from the decode worker.
        """
        done = self._scheduler.left_behind(before.name)
        prompt, same = job.order.request.prompt, before.order.request.prompt
        is_scored = job.order.request.sampling.prompt_logprobs is not None
        # More may have come of the chunk that was lost, which is computed again.
        helps = done >= self._scheduler.whole_chunks(job.total, destination.done)
        lies_here = self._gang.holds(before.name) and np.array_equal(prompt, same)
        return done if helps and lies_here and not is_scored else 0

    def _go_on(self, job: _Job, before: _Job, done: int) -> None:
        """Have a prompt go on with the pages that an earlier attempt left."""
        del self._left[job.origin]
        self._scheduler.come_back(before.name, job.name)
        self._gang.come_back(before.name, job.name, job.for_ranks, done)
        self._sink.add(metrics.PREFILL_TOKENS_BACK, done)
        job.began = time.time()

    def _end(self, job: _Job, error: LongreachError) -> None:
        """End a prompt here and now: its next chunk's turn may come before anyone reads this."""
        if job.name in self._jobs:
            job.events.put_nowait(error)
            self._leave(job)

    def _leave(self, job: _Job) -> None:
        """A prompt is over, and its request may not be: let its pages lie until that is known."""
        if job.began is None:
            self._forget(job)
        elif self._jobs.pop(job.name, None) is not None:
            self._scheduler.leave(job.name)
            if (older := self._left.get(job.origin)) is not None:
                self._forget(older)
            self._left[job.origin] = job
            self._report()

    def _forget(self, job: _Job) -> None:
        """Have a prompt's pages freed, after its chunk if one is being computed.

        The loop does it: a request that is being cancelled would take its calls to ranks with it,
        and these would wait for them ever after.
        """
        if self._jobs.get(job.name) is job:
            del self._jobs[job.name]
        elif self._left.get(job.origin) is job:
            del self._left[job.origin]
        else:
            return  # It is forgotten, or a later attempt has its pages.
        job.forget()
        self._leaving.append(job.name)
        self._wake.set()

    def _release_leaving(self) -> None:
        # Ranks get calls in order, so their pages are free before they are allocated again. Those
        # into which something is being fetched are freed after that.
        leaving = [name for name in self._leaving if not self._scheduler.is_fetching(name)]
        self._leaving = [name for name in self._leaving if self._scheduler.is_fetching(name)]
        for request_id in dict.fromkeys(leaving):
            self._gang.release(request_id)
            self._scheduler.remove(request_id)
        if leaving:
            self._report()

    def _release_taken(self) -> None:
        """Free what was left behind, and is somebody else's from the next chunk on."""
        taken = self._scheduler.taken()
        for job in [job for job in self._left.values() if job.name in taken]:
            del self._left[job.origin]
            job.forget()
        for request_id in taken:
            self._gang.release(request_id)

    async def _run(self) -> None:
        """Compute the chunk whose turn it is, or sleep until there is one, for good."""
        while not self._lost:
            await self._regrouping.may_begin()
            self._release_leaving()
            chunk = self._scheduler.next()
            self._release_taken()
            if chunk is None:
                self._wake.clear()
                await self._wake.wait()
            elif chunk.is_back:
                self._fetch(chunk)
            else:
                await self._compute(chunk)

    async def _compute(self, chunk: Chunk) -> None:
        """Begin a chunk; returns shortly before it is computed, when the next may be dealt out.

        Whoever comes, or leaves, until then does so before the next chunk.
        """
        job = self._begin(chunk)
        self._speed.begin()
        under_way = self._gang.begin_chunk(chunk, job.for_ranks)
        self._finishing = detached(self._finish(chunk, job, under_way.results, self._finishing))
        job.finishing = self._finishing
        self._finishing.add_done_callback(self._regroup_if_failed)
        await asyncio.wait({under_way.nearly, self._finishing}, return_when=FIRST_COMPLETED)
        if not (under_way.nearly.done() and under_way.nearly.result()):
            # A rank failed: what that means, its results will say.
            await asyncio.wait({self._finishing})

    def _regroup_if_failed(self, finishing: "asyncio.Task[None]") -> None:
        error = None if finishing.cancelled() else finishing.exception()
        if error is not None:
            self._regrouping.failed(error)

    async def _finish(
        self,
        chunk: Chunk,
        job: _Job,
        computed: "asyncio.Future[list[RankResult]]",
        before: "asyncio.Task[None] | None",
    ) -> None:
        """Say what came out of a chunk, after those before it."""
        await asyncio.wait({computed} if before is None else {computed, before})
        self._scheduler.ended(chunk, not _has_failed(computed))
        self._speed.end(0 if _has_failed(computed) else chunk.computed_tokens)
        try:
            results = computed.result()
        except RayError as error:
            self._failed(chunk, job, error)
            return
        self._count(chunk, job, results)
        self._report()
        failure = _first_failure(results)
        if self._jobs.get(chunk.request_id) is not job:
            return  # Its request is over.
        job.note_stages(results)
        job.scores += [result.scores for result in results if result.scores is not None]
        if failure is not None:
            self._fail_hand_off(job, failure)
        elif chunk.is_last:
            # Beside the next chunks: nobody else waits for the rest of this hand-off.
            task = detached(self._hand_off(job, results))
            self._handing_off.add(task)
            task.add_done_callback(self._handing_off.discard)
        else:
            job.events.put_nowait(Progress(chunk.end, job.total))

    def _begin(self, chunk: Chunk) -> _Job:
        """Whose chunk is begun."""
        job = self._jobs[chunk.request_id]
        if job.began is None:
            job.began = time.time()
            self._report()
        return job

    def _fetch(self, chunk: Chunk) -> None:
        """Begin to fetch a chunk that is back; other prompts' chunks go on beside it.

        The worker that has its pages may be dead, which Ray takes seconds to say of a whole node.
        """
        job = self._begin(chunk)
        fetched = self._gang.begin_fetch(chunk, job.for_ranks)
        job.finishing = detached(self._finish_fetch(chunk, job, fetched))
        job.finishing.add_done_callback(self._regroup_if_failed)

    async def _finish_fetch(
        self, chunk: Chunk, job: _Job, fetched: "asyncio.Future[list[RankResult]]"
    ) -> None:
        """Let a prompt go on behind pages that have come back, or end it where they have not.

        Those that came before lie here all the same, for a later attempt.
        """
        await asyncio.wait({fetched})
        results = [] if _has_failed(fetched) else fetched.result()
        failure = _first_failure(results)
        self._scheduler.ended(chunk, bool(results) and failure is None)
        self._wake.set()
        if failure is not None:
            # Whose pages they were may be gone by now, and the job with it: then this says it all.
            logger.warning("pages of request %s did not come back: %s", job.name, failure)
            self._fail_hand_off(job, failure)
            return
        if not results:
            if self._jobs.get(job.name) is job:
                fetched.result()  # raises
            return  # The ranks have met again since, or whoever watches them finds it.
        self._sink.add(metrics.PREFILL_TOKENS_BACK, chunk.end - chunk.start)
        job.note_stages(results)

    async def _hand_off(self, job: _Job, results: list[RankResult]) -> None:
        """Wait until all pages of a computed prompt have arrived, and say so."""
        computed = time.time()
        try:
            failure = await self._gang.flush(job.name)
        except (Exception, asyncio.CancelledError) as error:
            why = f"a rank did not hand its pages off ({type(error).__name__}); send it again"
            self._end(job, LostError(why))
            return
        if failure is not None:
            self._fail_hand_off(job, failure)
            return
        job.events.put_nowait(_prefilled(job, results, computed, hand_off=time.time() - computed))

    def _fail_hand_off(self, job: _Job, why: str) -> None:
        """End a prompt whose pages did not arrive; one that was released was not waited for."""
        if job.name in self._jobs:
            self._sink.add(metrics.HANDOFF_FAILURES)
        self._end(job, TransferError(why))

    def _failed(self, chunk: Chunk, job: _Job, error: RayError) -> None:
        """End the one request that needed too much; raise if ranks have to meet again."""
        ours = as_ours(error)
        if not isinstance(ours, OutOfMemoryError):
            raise error
        self._end(job, ours)
        self._forget(job)
        if self._gang.num_ranks > 1:
            # The others wait for this rank in a collective, and nothing calls them back.
            raise error

    def _count(self, chunk: Chunk, job: _Job, results: list[RankResult]) -> None:
        self._sink.add(metrics.PREFILL_CHUNKS)
        self._sink.add(metrics.PREFILL_TOKENS, chunk.computed_tokens)
        again = min(chunk.end, job.order.request.computed) - chunk.start
        self._sink.add(metrics.PREFILL_TOKENS_AGAIN, max(again, 0))
        busy = sorted(_busy_seconds(result) for result in results)
        self._sink.observe(metrics.RANK_SKEW, busy[-1] - busy[0])
        for stage, seconds in max(results, key=_busy_seconds).stages.items():
            self._sink.add(metrics.PREFILL_STAGE_SECONDS, seconds, stage=stage)

    def _begin_again(self, lost: int) -> None:
        """So many ranks were lost, and the others go on: with whatever its request brings back.

        Chunks that were under way have failed, and pages that a rank was to hand off are missing.
        What was computed lies here, and what arrived at the decode worker.
        """
        self._sink.add(metrics.LOST, lost)
        for job in list(self._jobs.values()):
            if job.began is not None:
                self._end(job, LostError(_GOES_ON))
        self._report()

    def _lose(self, error: BaseException) -> None:
        """The gang cannot go on: tell everybody who waits for it, and end what is left of it."""
        if self._lost:
            return
        logger.error("the prefill gang is lost", exc_info=error)
        self._lost = True
        if not isinstance(error, asyncio.CancelledError):  # as at the end of this process
            self._sink.add(metrics.LOST)
        self._wake.set()
        for job in self._jobs.values():
            job.events.put_nowait(LostError(_LOST, begun=job.began is not None))
        self._gang.kill()
        self._report()

    def _report(self) -> None:
        self._sink.set(metrics.PREFILL_RANKS, self._gang.num_ranks)
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._scheduler.num_running)
        self._sink.set(metrics.NUM_REQUESTS_WAITING, self._scheduler.num_waiting)
        self._sink.set(metrics.KV_CACHE_USAGE, self._scheduler.usage)
        self._sink.set(metrics.PROMPT_TOKENS_WAITING, self._scheduler.tokens_to_go)


def _prefilled(job: _Job, results: list[RankResult], computed: float, hand_off: float) -> Prefilled:
    assert job.began is not None
    return Prefilled(
        logits=next(result.logits for result in results if result.logits is not None),
        # Behind a prompt's last token comes none of its own.
        scores=np.concatenate(job.scores)[:-1] if job.scores else None,
        queued=max(job.began - job.order.request.arrived, 0.0),
        prefill=max(computed - job.began, 0.0),
        hand_off=hand_off,
        stages=job.stages,
    )


def _has_failed(computed: "asyncio.Future[list[RankResult]]") -> bool:
    return computed.cancelled() or computed.exception() is not None


def _first_failure(results: list[RankResult]) -> str | None:
    """Why a rank's pages did not get where they were to go."""
    return next((each.failure for each in results if each.failure is not None), None)


def _busy_seconds(result: RankResult) -> float:
    """Time spent on a chunk without what was spent waiting for other ranks."""
    return sum(s for stage, s in result.stages.items() if stage != "communication")
