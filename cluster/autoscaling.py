"""How many gangs and decode replicas the load asks for; delays are those of Serve's autoscaler.

Serve's own policy counts requests, and one request may be a million tokens or ten. Gangs are
counted by the tokens that wait over the speed at which they are computed, decode replicas by KV
pages.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from .settings import AutoscalingSettings

_LOOK_SECONDS = 20.0
_BUSY = 0.5
"""Of the time looked at: who computed for less is not held to be in the midst of a prompt."""

_BUSY_AT_MOST = 0.85


@dataclass(frozen=True)
class GangLoad:
    """Of one gang: tokens that wait, the speed that it computed at, and how busy it is, 0 to 1."""

    tokens_to_go: float
    tokens_per_second: float
    busy: float


@dataclass(frozen=True)
class DecodeLoad:
    """Of one decode replica: share of pages in use, and requests that hold and that want some.

    `batch`: sequences that generate, or wait for a place among them, over `decode.max_batch`.
    """

    kv_usage: float
    holding: float
    waiting: float
    batch: float

    @property
    def demand(self) -> float:
        """Pools of pages that would do, were those that wait as large as those that hold."""
        if not self.holding:
            return float(self.waiting > 0)
        return max(self.kv_usage * (self.holding + self.waiting) / self.holding, self.batch)


def gangs_for(loads: Collection[GangLoad], queue_seconds: float) -> int:
    """How many gangs compute what waits within that time, and have some time left over.

    Not fewer than are in mid-prompt, and one fewer at most: load comes in bursts. A gang that has
    computed nothing yet says nothing of speed; while none has, there are enough.
    """
    tokens = sum(load.tokens_to_go for load in loads)
    speeds = [load.tokens_per_second for load in loads if load.tokens_per_second > 0]
    for_queue = 0
    if speeds:
        for_queue = math.ceil(tokens / (sum(speeds) / len(speeds) * queue_seconds))
    elif tokens:
        for_queue = len(loads)
    for_work = math.ceil(sum(load.busy for load in loads) / _BUSY_AT_MOST)
    in_prompt = sum(load.busy >= _BUSY for load in loads)
    return max(for_queue, for_work, in_prompt, len(loads) - 1, 1)


def decode_replicas_for(loads: Collection[DecodeLoad], kv_usage: float) -> int:
    """How many decode replicas keep pages in use below that share, and batches below their size.

    One fewer at most than there are, as of gangs.
    """
    wanted = math.ceil(sum(load.demand for load in loads) / kv_usage)
    return max(wanted, len(loads) - 1, 1)


class GangPolicy:
    """Serve's policy for a kind of gang. Args: queue_seconds: as `gangs_for`."""

    def __init__(self, queue_seconds: float) -> None:
        self._queue_seconds = queue_seconds

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        loads = [GangLoad(**said) for said in told(context, GangLoad)]
        if not loads:
            return context.target_num_replicas, {}
        return gangs_for(loads, self._queue_seconds), {}


class DecodePolicy:
    """Serve's policy for decode replicas. Args: kv_usage: as `decode_replicas_for`."""

    def __init__(self, kv_usage: float) -> None:
        self._kv_usage = kv_usage

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        loads = [DecodeLoad(**said) for said in told(context, DecodeLoad)]
        if not loads:
            return context.target_num_replicas, {}
        return decode_replicas_for(loads, self._kv_usage), {}


def told(context: AutoscalingContext, kind: type) -> list[dict[str, float]]:
    """What each replica that runs told of its load, where it has told all."""
    fields = kind.__dataclass_fields__
    figures: Mapping[str, Mapping[Any, float]] = context.aggregated_metrics or {}
    complete = [set(figures.get(name, {})) for name in fields]
    replicas = set.intersection(*complete) & set(context.running_replicas)
    return [{name: figures[name][replica] for name in fields} for replica in replicas]


def replicas_of(
    replicas: int, max_replicas: int | None, policy: type, settings: AutoscalingSettings
) -> dict[str, Any]:
    """The options of a deployment that say how many replicas it has."""
    if max_replicas is None:
        return {"num_replicas": replicas}
    key = "queue_seconds" if policy is GangPolicy else "kv_usage"
    return {
        "autoscaling_config": AutoscalingConfig(
            min_replicas=replicas,
            max_replicas=max_replicas,
            look_back_period_s=_LOOK_SECONDS,
            upscale_delay_s=settings.up_seconds,
            downscale_delay_s=settings.down_seconds,
            policy=AutoscalingPolicy(
                policy_function=f"{__name__}:{policy.__name__}",
                policy_kwargs={key: getattr(settings, key)},
            ),
        )
    }
