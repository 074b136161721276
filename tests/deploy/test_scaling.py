"""The autoscaling policy over a simulated day of prompts."""

from itertools import pairwise

import pytest

from longreach.cluster.settings import AutoscalingSettings
from longreach.deploy.scaling.simulation import Outcome, Simulation, Sizes
from longreach.deploy.scaling.trace import Prompt, day

SETTINGS = AutoscalingSettings()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return day(peak_per_minute=60)


@pytest.fixture(scope="module")
def scaled(prompts: list[Prompt]) -> Outcome:
    return Simulation(Sizes(gang_speed=15_000.0), SETTINGS).run(prompts)


def test_every_prompt_is_answered_and_none_waits_for_good(
    prompts: list[Prompt], scaled: Outcome
) -> None:
    assert scaled.answered == len(prompts)
    waits = sorted(scaled.waits)
    assert len(waits) == len(prompts)
    # The promise, and what a gang takes to start.
    assert waits[int(0.95 * len(waits))] < SETTINGS.queue_seconds + 150


def test_it_costs_less_than_as_many_as_there_may_be(prompts: list[Prompt], scaled: Outcome) -> None:
    fixed = Simulation(Sizes(gang_speed=15_000.0), SETTINGS, scaled=False).run(prompts)
    assert scaled.gpu_hours < 0.6 * fixed.gpu_hours
    assert fixed.answered == len(prompts)


def test_numbers_follow_the_load_and_do_not_flutter(scaled: Outcome) -> None:
    gangs = [moment.gangs for moment in scaled.moments]
    assert max(gangs) > 2
    assert gangs[-1] <= 2
    turns = [later > before for before, later in pairwise(gangs) if later != before]
    assert sum(up != down for up, down in pairwise(turns)) <= 100, "of at most 288"
    assert all(before - later <= 1 for before, later in pairwise(gangs))
