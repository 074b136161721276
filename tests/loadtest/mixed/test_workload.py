"""What is asked, cut to what an endpoint has room for."""

from dataclasses import replace

import pytest

from longreach.loadtest.mixed.mix import Mix
from longreach.loadtest.mixed.plan import Bounds, ClosedLoad
from longreach.loadtest.mixed.prepare import Style
from longreach.loadtest.mixed.slo import Slo
from longreach.loadtest.mixed.trace import TraceLine
from longreach.loadtest.mixed.workload import Workload

WORKLOAD = Workload(
    source=Mix.parse("200=1,300-500=9"),
    slo=Slo.parse("500=1", 0.1),
    style=Style(check=True, whole=True),
    bounds=Bounds(10, 10.0, 10.0),
    answer_tokens=16,
    scale=1.0,
    seed=1,
)


def test_a_mix_ends_a_hundredth_before_the_endpoint_as_lengths_are_estimates() -> None:
    cut = WORKLOAD.cut_to(516)
    assert isinstance(cut.source, Mix)
    assert cut.source.classes[-1].highest == 495
    assert WORKLOAD.cut_to(None) == WORKLOAD.cut_to(1_000) == WORKLOAD
    with pytest.raises(ValueError, match="--mix"):
        WORKLOAD.cut_to(300)


def test_a_trace_that_the_endpoint_has_no_room_for_is_refused() -> None:
    line = TraceLine(timestamp=0, input_length=400, output_length=100)
    traced = replace(WORKLOAD, source=(line,))
    assert traced.cut_to(600) == traced
    with pytest.raises(ValueError, match="500"):
        traced.cut_to(500)
    assert replace(traced, scale=0.5).cut_to(500).source == (line,)


def test_warming_up_asks_the_shortest_one_by_one() -> None:
    plan = WORKLOAD.plan_warm_up(2)
    assert [ask.tokens for ask in plan.asks] == [200, 200]
    assert plan.load == ClosedLoad(1)
    lines = tuple(TraceLine(timestamp=0, input_length=n, output_length=7) for n in (400, 300))
    traced = replace(WORKLOAD, source=lines).plan_warm_up(1)
    assert [(ask.tokens, ask.answer_tokens) for ask in traced.asks] == [(300, 7)]
