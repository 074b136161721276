"""The ranks of one prefill replica: placed together, called together, replaced together."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...engine.errors import ConfigurationError, UnavailableError
from ..pulse import Allowance, Reading, watch
from ..settings import GangSettings, NodeLabels, PrefillSettings
from .rank import PrefillRank, RankResult
from .scheduler import Chunk

# On top of the time that the gang of a replica which is being replaced may take to finish.
_PLACEMENT_SECONDS = 120


_HAND_OFF, _HEALTH, _RESULTS = "hand-off", "health", "results"
_GROUPS = {_HAND_OFF: 64, _HEALTH: 1, _RESULTS: 4}
"""Threads of a rank beside the one that launches: for flushes, to say that it is well, and to wait
for the results of chunks, of which two are under way at most."""

# A chunk may take longer than any before it: a prompt's later ones attend to more. So only a stop
# of the whole process is found fast, and one within a chunk after minutes.
_ALLOWANCE = Allowance(seconds=60.0, times=4.0, slowest_at_least=30.0)


@dataclass(frozen=True)
class ChunkUnderWay:
    """A chunk that the ranks compute.

    `nearly` is done when all ranks have launched it and nearly computed it, true, or when one of
    them has failed. `results` is done when they have computed it, or with what one of them raised.
    """

    nearly: "asyncio.Future[bool]"
    results: "asyncio.Future[list[RankResult]]"


class Gang:
    """Calls every rank, in the same order on each.

    Whatever a call raises, the gang is lost; OutOfMemoryError does no harm to a gang of one rank.
    """

    def __init__(self, group: PlacementGroup, ranks: list[Any]) -> None:
        self._group = group
        self._ranks = ranks

    @classmethod
    async def start(cls, settings: GangSettings, metrics_directory: Path) -> "Gang":
        """Place the ranks, let them meet, and load the model; returns when all are ready.

        Raises:
            ConfigurationError: the cluster has no room for them.
        """
        prefill = settings.prefill
        ranks_on: dict[str, Any] = {"strategy": prefill.placement}
        if prefill.nodes:
            ranks_on["bundle_label_selector"] = [prefill.nodes] * prefill.num_ranks
        group = placement_group([_resources(prefill)] * prefill.num_ranks, **ranks_on)
        await _placed(group, settings)
        actor = cast(Any, ray.remote)(concurrency_groups=_GROUPS)(PrefillRank)
        ranks = [
            actor.options(
                num_cpus=prefill.cpus_per_rank,
                num_gpus=prefill.gpus_per_rank,
                scheduling_strategy=PlacementGroupSchedulingStrategy(
                    group, placement_group_bundle_index=rank
                ),
            ).remote(settings, rank)
            for rank in range(prefill.num_ranks)
        ]
        for rank in ranks:
            rank.tell_figures.remote(metrics_directory)
        gang = cls(group, ranks)
        try:
            await gang._watched(_join(ranks, settings.prefill.tensor_parallel))
        except BaseException:
            gang.kill()
            raise
        return gang

    @property
    def num_ranks(self) -> int:
        """Ranks that compute every chunk together."""
        return len(self._ranks)

    def begin_chunk(
        self,
        chunk: Chunk,
        prompt: "ray.ObjectRef | None" = None,
        destination: "ray.ObjectRef | None" = None,
    ) -> ChunkUnderWay:
        """Compute one chunk on all ranks, or have them fetch it; the other two go with the first.

        The next may be begun when this one is nearly computed, so that no rank stands still.
        """
        begun = [rank.begin_chunk.remote(chunk, prompt, destination) for rank in self._ranks]
        results = [
            rank.finish_chunk.options(concurrency_group=_RESULTS).remote(chunk)
            for rank in self._ranks
        ]
        return ChunkUnderWay(
            asyncio.ensure_future(_all_went_well(begun)),
            asyncio.ensure_future(_all_of(results)),
        )

    def come_back(self, request_id: str, to: str, destination: "ray.ObjectRef", done: int) -> None:
        """Have every rank go on with a request under another name; see `PrefillRank.come_back`."""
        for rank in self._ranks:
            rank.come_back.remote(request_id, to, destination, done)

    async def flush(self, request_id: str) -> str | None:
        """Return when all pages of a prompt have arrived, or why they did not.

        The ranks compute other prompts meanwhile.
        """
        calls = [
            rank.flush.options(concurrency_group=_HAND_OFF).remote(request_id)
            for rank in self._ranks
        ]
        failures = await asyncio.gather(*calls)
        return next((failure for failure in failures if failure is not None), None)

    def release(self, request_id: str) -> None:
        """Have every rank forget a request, after whatever it is computing."""
        for rank in self._ranks:
            rank.release.remote(request_id)

    async def watch(self, is_busy: Callable[[], bool]) -> str:
        """Return, in words, what has become of the first rank that died or hangs."""
        watches = [
            asyncio.create_task(watch(self._reader(rank), is_busy, _ALLOWANCE))
            for rank in self._ranks
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in watches:
                each.cancel()
        first = watches.index(next(iter(done)))
        return f"rank {first} {watches[first].result()}"

    async def _watched(self, joining: Coroutine[Any, Any, None]) -> None:
        """Wait until all ranks have joined; a rank that dies or hangs meanwhile ends the wait.

        Raises:
            UnavailableError: one did. Otherwise as `joining`.
        """
        work = asyncio.ensure_future(joining)
        end = asyncio.ensure_future(self._watch_loading())
        try:
            await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise UnavailableError(f"{end.result()} while it loaded")
            work.result()
        finally:
            for each in (work, end):
                each.cancel()

    async def _watch_loading(self) -> str:
        # A process may take its time to start; from its first answer on it must go on answering.
        await asyncio.gather(*(self._reader(rank)() for rank in self._ranks))
        return await self.watch(is_busy=lambda: False)

    def _reader(self, rank: Any) -> Callable[[], Awaitable[Reading]]:
        return rank.pulse.options(concurrency_group=_HEALTH).remote

    def kill(self) -> None:
        """End all ranks: one that lost another would wait for it in a collective."""
        for rank in self._ranks:
            ray.kill(rank)
        remove_placement_group(self._group)


async def _all_went_well(calls: list[Any]) -> bool:
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    return not any(isinstance(outcome, BaseException) for outcome in outcomes)


async def _all_of(calls: list[Any]) -> list[Any]:
    return list(await asyncio.gather(*calls))


def _resources(prefill: PrefillSettings) -> dict[str, float]:
    """What one rank is placed by; Ray refuses a bundle of nothing."""
    asked = {"CPU": prefill.cpus_per_rank, "GPU": prefill.gpus_per_rank}
    return {name: amount for name, amount in asked.items() if amount}


def _labelled(nodes: NodeLabels) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in nodes.items())
    return f", on nodes with {labels}" if labels else ""


async def _join(ranks: list[Any], tensor_parallel: int) -> None:
    """Let the ranks meet and load; each is told how many are on its card.

    Raises:
        ConfigurationError: tensor ranks, which add up hidden states, would compute in two types.
    """
    types = set(await asyncio.gather(*(rank.compute_type.remote() for rank in ranks)))
    if tensor_parallel > 1 and len(types) > 1:
        raise ConfigurationError(
            f"machines of a gang would compute in {' and '.join(sorted(types))}, and tensor ranks "
            "need one type; set model.dtype to one of them"
        )
    meeting = await ranks[0].open_meeting.remote()
    cards = await asyncio.gather(*(rank.card.remote() for rank in ranks))
    counts = Counter(cards)
    # On CPUs there is no card to divide.
    shared = [1 if card is None else counts[card] for card in cards]
    joins = (rank.join.remote(meeting, count) for rank, count in zip(ranks, shared, strict=True))
    await asyncio.gather(*joins)


async def _placed(group: PlacementGroup, settings: GangSettings) -> None:
    prefill = settings.prefill
    seconds = settings.drain_seconds + _PLACEMENT_SECONDS
    try:
        await asyncio.wait_for(asyncio.wrap_future(group.ready().future()), seconds)
    except TimeoutError as error:
        remove_placement_group(group)
        raise ConfigurationError(
            f"no room for a prefill gang within {seconds:g} s: {prefill.num_ranks} ranks "
            f"of {prefill.cpus_per_rank:g} CPUs and {prefill.gpus_per_rank:g} GPUs, "
            f"{prefill.placement}{_labelled(prefill.nodes)}; add nodes, or lower cpus_per_rank or "
            "replicas"
        ) from error
