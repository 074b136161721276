"""The processes of one decode replica's worker: one, or as many as it spans devices.

Placed together, watched together, and ended together: no rank goes on without the others.
"""

import asyncio
import secrets
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ..pulse import Allowance, watch
from ..settings import DecodeSettings, WorkerSettings
from .follower import DecodeFollower
from .meeting import WorkerMeeting
from .worker import DecodeWorker

# Every waiting request is a call, and so is every message of pages under way.
_CALLS_AT_ONCE = 1_000_000


class WorkerProcesses:
    """The worker's actor, by the name `worker_id`, and those of its further ranks."""

    def __init__(self, group: PlacementGroup | None) -> None:
        self.worker_id = f"longreach-decode-{uuid.uuid4().hex}"
        self.worker: Any = None
        self._followers: list[Any] = []
        self._group = group

    @classmethod
    async def start(cls, settings: WorkerSettings, metrics_directory: Path) -> "WorkerProcesses":
        """Place them, and have them load; returns when all are able to work.

        Raises: what one of them raised; all are ended then.
        """
        decode = settings.decode
        group = await _placed(decode) if decode.tensor_parallel > 1 else None
        processes = cls(group)
        try:
            if group is None:
                placed = {"label_selector": decode.nodes or None}
                processes._make_worker(settings, metrics_directory, placed, None)
                await processes.worker.start.remote(processes.worker)
            else:
                await processes._meet(settings, metrics_directory, group)
        except BaseException:
            processes.kill()
            raise
        return processes

    async def _meet(
        self, settings: WorkerSettings, metrics_directory: Path, group: PlacementGroup
    ) -> None:
        actor = cast(Any, ray.remote(DecodeFollower))
        for rank in range(1, settings.decode.tensor_parallel):
            options = {**_asks(settings.decode), **_at(group, rank)}
            self._followers.append(
                actor.options(**options).remote(settings, rank, metrics_directory)
            )
        key = secrets.token_bytes(32)
        store = await self._followers[0].open_meeting.remote()
        channels = await asyncio.gather(*(each.listen.remote(key) for each in self._followers))
        meeting = WorkerMeeting(store, tuple(channels), key)
        self._make_worker(settings, metrics_directory, _at(group, 0), meeting)
        joining = [each.join.remote(each, meeting) for each in self._followers]
        # The first that fails ends the wait: the others wait for it.
        await asyncio.gather(self.worker.start.remote(self.worker, self._followers), *joining)

    def _make_worker(
        self,
        settings: WorkerSettings,
        metrics_directory: Path,
        placed: dict[str, Any],
        meeting: WorkerMeeting | None,
    ) -> None:
        actor = cast(Any, ray.remote(DecodeWorker)).options(
            name=self.worker_id, **_asks(settings.decode), **placed
        )
        self.worker = actor.remote(settings, metrics_directory, meeting)

    async def watch(self, is_busy: Callable[[], bool]) -> str:
        """Return, in words, what has become of the first process that died or hangs."""
        every = [self.worker, *self._followers]
        watches = [
            asyncio.create_task(watch(each.pulse.remote, is_busy, Allowance())) for each in every
        ]
        try:
            done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in watches:
                each.cancel()
        first = watches.index(next(iter(done)))
        of = f"rank {first} of " if self._followers else ""
        return f"{of}the decode worker {watches[first].result()}"

    def kill(self) -> None:
        """End all of them: one that lost another would wait for it in a collective."""
        for each in (self.worker, *self._followers):
            if each is not None:
                ray.kill(each)
        if self._group is not None:
            remove_placement_group(self._group)


def _asks(decode: DecodeSettings) -> dict[str, Any]:
    return {
        "num_cpus": decode.cpus,
        "num_gpus": decode.gpus,
        "max_concurrency": _CALLS_AT_ONCE,
    }


def _at(group: PlacementGroup, rank: int) -> dict[str, Any]:
    return {
        "scheduling_strategy": PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=rank
        )
    }


async def _placed(decode: DecodeSettings) -> PlacementGroup:
    """Room for all ranks on one node; waits for it as long as it takes, as one worker would."""
    asked = {"CPU": decode.cpus, "GPU": decode.gpus}
    bundle = {name: amount for name, amount in asked.items() if amount}
    ranks = decode.tensor_parallel
    labels: dict[str, Any] = {}
    if decode.nodes:
        labels["bundle_label_selector"] = [decode.nodes] * ranks
    group = placement_group([bundle] * ranks, strategy="STRICT_PACK", **labels)
    try:
        await asyncio.wrap_future(group.ready().future())
    except BaseException:
        remove_placement_group(group)
        raise
    return group
