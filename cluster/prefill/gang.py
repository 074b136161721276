"""The ranks of one prefill replica: placed together, called together, ended together.

A gang outlives its ranks, as long as one row of them is left (or as many as the memory of each is
enough for): see `rows`. Which prompts' pages a row has is known here, so that a row that came later
gets them from another before it computes.
"""

import asyncio
import itertools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError

from ...engine.errors import LeftMeshError, LongreachError, LostError, innermost
from ..call_errors import CallError
from ..settings import GangSettings
from ..tasks import detached
from . import rows
from .placement import HAND_OFF, RESULTS, Placement
from .rank import RankResult
from .rows import Row
from .scheduler import Chunk

logger = logging.getLogger(__name__)

_SECONDS_BETWEEN_TRIES = 10.0
"""In which a process that was killed is gone, with what it held of its card."""


@dataclass(frozen=True)
class ChunkUnderWay:
    """A chunk that the ranks compute.

    `nearly` is done when all ranks have launched it and nearly computed it, true, or when one of
    them has failed. `results` is done when they have computed it, or with what one of them raised.
    """

    nearly: "asyncio.Future[bool]"
    results: "asyncio.Future[list[RankResult]]"


@dataclass(frozen=True)
class OfPrompt:
    """What a rank needs to know of a prompt with its first chunk, or when it gets its pages."""

    tokens: "ray.ObjectRef[Any]"
    destination: "ray.ObjectRef[Any]"


class Gang:
    """Calls every rank, in the same order on each.

    Whatever a call raises, chunks under way are lost, and the ranks compute no other before
    `regroup`; OutOfMemoryError does no harm to a gang of one rank.
    """

    def __init__(self, settings: GangSettings, placement: Placement) -> None:
        self._settings, self._placement = settings, placement
        self._rows: list[Row] = []
        self._fewest = 1
        self._coming: list[Row] = []
        # Of each prompt whose pages lie here, the rows that have all of them so far.
        self._held_by: dict[str, frozenset[Row]] = {}
        # And those that had them before, until it is known that what they give to others has come.
        self._held_before: dict[str, frozenset[Row]] = {}
        self._told: set[asyncio.Task[None]] = set()
        self._on_trouble: Callable[[BaseException], None] | None = None

    def tell_trouble_to(self, on_trouble: Callable[[BaseException], None]) -> None:
        """Call this where ranks that live could not give each other pages: some of them wait."""
        self._on_trouble = on_trouble

    @classmethod
    async def start(cls, settings: GangSettings, metrics_directory: Path) -> "Gang":
        """Place the ranks, let them meet, and load the model; returns when all are ready.

        Raises:
            ConfigurationError: the cluster has no room for them.
        """
        gang = cls(settings, await Placement.reserve(settings, metrics_directory))
        try:
            every = [gang._start_row(row) for row in range(settings.prefill.sequence_parallel)]
            gang._fewest = await rows.join(every)
            gang._rows = every
        except BaseException:
            gang.kill()
            raise
        return gang

    @property
    def num_ranks(self) -> int:
        """Ranks that compute every chunk together, now."""
        return len(self._ranks)

    @property
    def is_whole(self) -> bool:
        """Whether these are as many as it was made for."""
        return self.num_ranks == self._settings.prefill.num_ranks

    def holds(self, request_id: str) -> bool:
        """Whether what was computed of a prompt lies here."""
        return bool(self._holders(request_id))

    @property
    def told(self) -> "frozenset[asyncio.Task[None]]":
        """What ranks were told beside their chunks and have not done yet, as to share pages."""
        return frozenset(self._told)

    def begin_chunk(self, chunk: Chunk, prompt: OfPrompt) -> ChunkUnderWay:
        """Compute one chunk on all ranks.

        The next may be begun when this one is nearly computed, so that no rank stands still.
        """
        given = self._given(chunk, prompt)
        begun = [rank.begin_chunk.remote(chunk, *given) for rank in self._ranks]
        results = [
            rank.finish_chunk.options(concurrency_group=RESULTS).remote(chunk)
            for rank in self._ranks
        ]
        computed = asyncio.ensure_future(_all_of(results))
        computed.add_done_callback(lambda ended: self._note_end(chunk.request_id, ended))
        return ChunkUnderWay(asyncio.ensure_future(_all_went_well(begun)), computed)

    def begin_fetch(self, chunk: Chunk, prompt: OfPrompt) -> "asyncio.Future[list[RankResult]]":
        """Have all ranks fetch a chunk that is back, beside chunks of other prompts.

        Done when none of them fetches any more, with what one of them raised if one did. Until then
        the prompt gets no other chunk, and is neither released nor comes back.
        """
        given = self._given(chunk, prompt)
        self._note_told("fetch", [rank.begin_fetch.remote(chunk, *given) for rank in self._ranks])
        calls = [
            rank.finish_fetch.options(concurrency_group=HAND_OFF).remote(chunk)
            for rank in self._ranks
        ]
        return asyncio.ensure_future(_all_ended(calls))

    def _given(self, chunk: Chunk, prompt: OfPrompt) -> tuple[Any, Any]:
        """What ranks need with a chunk; those that came later get the pages before it."""
        if chunk.request_id in self._held_by:
            self._share(chunk.request_id, prompt, chunk.start)
            return None, None
        self._held_by[chunk.request_id] = frozenset(self._rows)
        return prompt.tokens, prompt.destination

    def come_back(self, request_id: str, to: str, prompt: OfPrompt, done: int) -> None:
        """Have every rank go on with a request under another name; see `PrefillRank.come_back`."""
        self._share(request_id, prompt, done)
        self._held_by[to] = self._held_by.pop(request_id)
        if (before := self._held_before.pop(request_id, None)) is not None:
            self._held_before[to] = before
        given = (request_id, to, prompt.destination, done)
        self._note_told("go on", [rank.come_back.remote(*given) for rank in self._ranks])

    async def flush(self, request_id: str) -> str | None:
        """Return when all pages of a prompt have arrived, or why they did not.

        The ranks compute other prompts meanwhile.

        Raises:
            CallError: a rank is lost.
        """
        calls = [
            rank.flush.options(concurrency_group=HAND_OFF).remote(request_id)
            for row in self._holders(request_id)
            for rank in row.ranks
        ]
        failures = await asyncio.gather(*calls)
        return next((failure for failure in failures if failure is not None), None)

    def release(self, request_id: str) -> None:
        """Have every rank forget a request, after whatever it is computing."""
        self._held_by.pop(request_id, None)
        self._held_before.pop(request_id, None)
        for rank in self._ranks:
            rank.release.remote(request_id)

    async def watch(self, is_busy: Callable[[], bool]) -> str:
        """Return, in words, what has become of the first rank that died or hangs."""
        return await rows.watch_ranks(self._rows, is_busy)

    async def regroup(self) -> int:
        """Have the ranks that live, and those that are ready to come, go on together.

        Chunks under way fail, and have ended in every rank when this returns.

        Returns:
            how many ranks were lost.

        Raises:
            LostError: too few are left, or they do not meet.
        """
        before, coming, self._coming = self._rows, self._coming, []
        # What was being given to rows may have been given up half-way, and is given again.
        self._held_by.update(self._held_before)
        self._held_before.clear()
        whole = await rows.part([*before, *coming])
        if len(whole) < self._fewest:
            raise LostError(f"{len(whole)} rows of ranks are left, and {self._fewest} are needed")
        await rows.meet(whole)
        self._rows = whole
        lost = [row for row in before if row not in whole]
        return len(rows.ranks_of(lost))

    async def recruit(self) -> None:
        """Start ranks in place of those that were lost; returns when they are ready to join.

        They load while the others compute. Tried again and again where it fails.
        """
        while True:
            taken = {row.number for row in self._rows}
            every = range(self._settings.prefill.sequence_parallel)
            coming = [self._start_row(number) for number in every if number not in taken]
            try:
                # Each row by itself: it meets the others when it is ready.
                await asyncio.gather(*(rows.join([row]) for row in coming))
            except (*CallError, LongreachError) as error:
                logger.warning("a new rank did not come up, and is tried again: %s", error)
                for row in coming:
                    row.kill()
                await asyncio.sleep(_SECONDS_BETWEEN_TRIES)
            else:
                self._coming = coming
                return

    def kill(self) -> None:
        """End all ranks, those that load as well."""
        for row in itertools.chain(self._rows, self._coming):
            row.kill()
        self._rows = []
        self._placement.remove()

    @property
    def _ranks(self) -> Sequence[Any]:
        return rows.ranks_of(self._rows)

    def _holders(self, request_id: str) -> list[Row]:
        held_by = self._held_by.get(request_id, frozenset())
        return [row for row in self._rows if row in held_by]

    def _share(self, request_id: str, prompt: OfPrompt, done: int) -> None:
        """Give the pages of a prompt to the rows that came later, from the first, which has them.

        Rows are in the order in which they came: what any of them has, the first has as well.
        """
        holders = self._holders(request_id)
        if len(holders) == len(self._rows):
            return
        calls = [
            rank.share.remote(
                request_id, prompt.tokens, prompt.destination, done, row not in holders
            )
            for row in self._rows
            for rank in row.ranks
        ]
        self._note_told("share pages", calls, self._on_trouble)
        self._held_before.setdefault(request_id, self._held_by[request_id])
        self._held_by[request_id] = frozenset(self._rows)

    def _note_told(
        self,
        what: str,
        calls: list[Any],
        on_trouble: Callable[[BaseException], None] | None = None,
    ) -> None:
        """Calls whose answers nobody waits for; what they raise shows later, and as another error.

        So it is logged here, and said to `on_trouble` unless it follows from a death.
        """
        told = detached(_note_failures(what, calls, on_trouble))
        self._told.add(told)
        told.add_done_callback(self._told.discard)

    def _note_end(self, request_id: str, computed: "asyncio.Future[Any]") -> None:
        """A chunk has ended: if it is computed, so has come whatever was given to rows before it.

        No rank says that a chunk is computed when it has left its mesh since.
        """
        if not computed.cancelled() and computed.exception() is None:
            self._held_before.pop(request_id, None)

    def _start_row(self, number: int) -> Row:
        size = self._settings.prefill.tensor_parallel
        bundles = range(number * size, (number + 1) * size)
        return Row(number, tuple(self._placement.start_rank(bundle) for bundle in bundles))


async def _all_went_well(calls: list[Any]) -> bool:
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return not any(isinstance(outcome, BaseException) for outcome in outcomes)


async def _note_failures(
    what: str, calls: list[Any], on_trouble: Callable[[BaseException], None] | None
) -> None:
    # Each as it comes: others may wait for the rank that has failed, and never end.
    for call in asyncio.as_completed(calls):
        try:
            await call
        except (RayError, LongreachError) as raised:
            error = innermost(raised)
            logger.warning("a rank was told to %s, and failed: %r", what, error)
            if on_trouble and not isinstance(error, (LeftMeshError, RayActorError)):
                on_trouble(raised)


async def _all_of(calls: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


async def _all_ended(calls: list[Any]) -> list[Any]:
    """As `_all_of`, but no call goes on when this has ended."""
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome
    return outcomes
