"""Where the ranks of one gang run: placed together, each in a bundle of its own, for good."""

import asyncio
from pathlib import Path
from typing import Any, cast

import ray
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from ...engine.errors import ConfigurationError
from ..settings import GangSettings, NodeLabels, PrefillSettings
from .rank import PrefillRank

# On top of the time that whatever is being replaced may take to finish.
_PLACEMENT_SECONDS = 120

HAND_OFF, HEALTH, LEAVE, RESULTS = "hand-off", "health", "leave", "results"
_GROUPS = {HAND_OFF: 64, HEALTH: 1, LEAVE: 1, RESULTS: 4}
"""Threads of a rank beside the one that launches: for flushes and fetches, to say that it is well,
to free the one that launches, and to wait for the results of chunks, of which two are under way at
most."""


class Placement:
    """Bundles of resources, one for each rank. Whoever comes in place of a rank gets its bundle."""

    def __init__(
        self, settings: GangSettings, metrics_directory: Path, group: PlacementGroup
    ) -> None:
        self._settings, self._metrics_directory = settings, metrics_directory
        self._group = group

    @classmethod
    async def reserve(cls, settings: GangSettings, metrics_directory: Path) -> "Placement":
        """Returns when there is room for all ranks.

        Raises:
            ConfigurationError: the cluster has none.
        """
        prefill = settings.prefill
        ranks_on: dict[str, Any] = {"strategy": prefill.placement}
        if prefill.nodes:
            ranks_on["bundle_label_selector"] = [prefill.nodes] * prefill.num_ranks
        group = placement_group([_resources(prefill)] * prefill.num_ranks, **ranks_on)
        await _placed(group, settings)
        return cls(settings, metrics_directory, group)

    def start_rank(self, bundle: int) -> Any:
        """A new rank's actor."""
        prefill = self._settings.prefill
        actor = cast(Any, ray.remote)(concurrency_groups=_GROUPS)(PrefillRank)
        strategy = PlacementGroupSchedulingStrategy(
            self._group, placement_group_bundle_index=bundle
        )
        rank = actor.options(
            num_cpus=prefill.cpus_per_rank,
            num_gpus=prefill.gpus_per_rank,
            scheduling_strategy=strategy,
        ).remote(self._settings)
        rank.tell_figures.remote(self._metrics_directory)
        return rank

    def remove(self) -> None:
        """Give the room back; ends whoever is in it."""
        remove_placement_group(self._group)


def _resources(prefill: PrefillSettings) -> dict[str, float]:
    """What one rank is placed by; Ray refuses a bundle of nothing."""
    asked = {"CPU": prefill.cpus_per_rank, "GPU": prefill.gpus_per_rank}
    return {name: amount for name, amount in asked.items() if amount}


def _labelled(nodes: NodeLabels) -> str:
    labels = ", ".join(f"{name}={value}" for name, value in nodes.items())
    return f", on nodes with {labels}" if labels else ""


async def _placed(group: PlacementGroup, settings: GangSettings) -> None:
    prefill = settings.prefill
    seconds = settings.others_seconds + _PLACEMENT_SECONDS
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
