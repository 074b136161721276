"""How many replicas a load asks for, and what replicas say of theirs."""

from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.serve.config import AutoscalingConfig

from longreach.cluster import autoscaling
from longreach.cluster.autoscaling import (
    DecodeLoad,
    DecodePolicy,
    GangLoad,
    GangPolicy,
    decode_replicas_for,
    gangs_for,
    replicas_of,
)
from longreach.cluster.prefill.speed import Speed
from longreach.cluster.settings import AutoscalingSettings, parse_settings
from longreach.engine.errors import ConfigurationError

from .conftest import make_settings


def gang(tokens: float, busy: float = 1.0, speed: float = 10_000.0) -> GangLoad:
    return GangLoad(tokens, speed, busy)


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([gang(0, busy=0)], 1),
        ([gang(600_000, busy=0.8)], 1),
        ([gang(600_001, busy=0.8)], 2),
        ([gang(0, busy=0.9)], 2),  # nothing waits, and hardly any time is left over
        ([gang(3_000_000), gang(0, busy=0)], 5),
        ([gang(1, busy=0.6)] * 3 + [gang(1, busy=0.2)], 3),  # three are in mid-prompt
        ([gang(0, busy=0)] * 5, 4),  # one fewer at a time
        ([gang(5_000_000, speed=0, busy=0)], 1),  # nobody knows yet how fast they are
        ([gang(600_001, speed=0, busy=0), gang(600_000, busy=0.5)], 3),
    ],
)
def test_gangs_are_counted_by_tokens_over_speed(loads: list[GangLoad], wanted: int) -> None:
    assert gangs_for(loads, queue_seconds=60) == wanted


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([DecodeLoad(0, 0, 0, 0)], 1),
        ([DecodeLoad(0.8, 4, 0, 0.5)], 1),
        ([DecodeLoad(0.81, 4, 0, 0.5)], 2),
        ([DecodeLoad(0.8, 4, 4, 0.5)], 2),  # as many again wait for pages
        ([DecodeLoad(0.1, 4, 0, 1.7)], 3),  # sequences wait for a place in the batch
        ([DecodeLoad(0, 0, 3, 0)], 2),
        ([DecodeLoad(0.3, 1, 0, 0.1), DecodeLoad(0.3, 1, 0, 0.1)], 1),
        ([DecodeLoad(0.1, 1, 0, 0.1)] * 4, 3),  # one fewer at a time
    ],
)
def test_decode_replicas_are_counted_by_pages(loads: list[DecodeLoad], wanted: int) -> None:
    assert decode_replicas_for(loads, kv_usage=0.8) == wanted


def context(figures: dict[str, dict[str, float]], running: list[str]) -> Any:
    return SimpleNamespace(
        aggregated_metrics=figures, running_replicas=running, target_num_replicas=2
    )


def test_only_replicas_that_run_and_told_all_are_counted() -> None:
    figures = {
        "tokens_to_go": {"a": 900_000.0, "gone": 9e9, "new": 9e9},
        "tokens_per_second": {"a": 10_000.0, "gone": 1.0},
        "busy": {"a": 0.8, "gone": 1.0},
    }
    assert GangPolicy(60)(context(figures, ["a", "new"])) == (2, {})
    assert GangPolicy(60)(context({}, ["a"])) == (2, {}), "as it is, while nobody told anything"
    assert DecodePolicy(0.8)(context({}, [])) == (2, {})


def test_serve_is_told_by_settings() -> None:
    settings = AutoscalingSettings(queue_seconds=30, down_seconds=5)
    assert replicas_of(3, None, GangPolicy, settings) == {"num_replicas": 3}
    (config,) = replicas_of(1, 4, GangPolicy, settings).values()
    assert isinstance(config, AutoscalingConfig)
    assert (config.min_replicas, config.max_replicas) == (1, 4)
    assert config.downscale_delay_s == 5
    made = cast(Any, config.policy.get_policy())
    assert made is not None
    assert config.policy.policy_function == f"{autoscaling.__name__}:GangPolicy"
    assert config.policy.policy_kwargs == {"queue_seconds": 30}


def test_fewer_at_most_than_at_least_is_refused() -> None:
    raw = make_settings(1).model_dump(mode="json")
    raw["decode"].update(replicas=3, max_replicas=2)
    with pytest.raises(ConfigurationError, match=r"decode\.max_replicas"):
        parse_settings(raw)
    raw["decode"].update(max_replicas=3)
    raw["prefill"][0].update(max_replicas=1, replicas=2)
    with pytest.raises(ConfigurationError, match=r"prefill\.max_replicas"):
        parse_settings(raw)


def test_speed_is_of_chunks_and_busyness_of_the_last_half_minute() -> None:
    now = 100.0
    speed = Speed(lambda: now)
    assert speed.load(7) == {"tokens_to_go": 7.0, "tokens_per_second": 0.0, "busy": 0.0}
    speed.begin()
    now += 6
    assert speed.load(0)["busy"] == pytest.approx(0.2)
    speed.begin()  # before the first has ended, and computed from then on
    now += 1
    speed.end(1000)
    now += 3
    speed.end(0)  # failed
    assert speed.load(0)["tokens_per_second"] == pytest.approx(1000 / 7)
    assert speed.load(0)["busy"] == pytest.approx(7 / 30)
    speed.begin()
    now += 3
    speed.end(1000)
    assert speed.load(0)["tokens_per_second"] == pytest.approx(2000 / 10)
    now += 26
    assert speed.load(0)["busy"] == pytest.approx(3 / 30)
