"""Percentiles, goodput and errors by class."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.loadtest.mixed.record import FailureKind, Verdict
from longreach.loadtest.mixed.slo import Slo
from longreach.loadtest.mixed.summary import spread, summarize

from .records import failed, record

SLO = Slo.parse("1K=1,8K=2", per_token=0.02)
VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=200)


@given(VALUES)
def test_percentiles_are_values_in_order_between_the_least_and_the_most(
    values: list[float],
) -> None:
    found = spread(values)
    assert found is not None
    assert min(values) <= found.p50 <= found.p90 <= found.p99 <= max(values)


@given(VALUES, st.randoms())
def test_percentiles_do_not_depend_on_the_order(values: list[float], chance) -> None:
    shuffled = list(values)
    chance.shuffle(shuffled)
    assert spread(shuffled) == spread(values)


@given(VALUES, st.floats(0.1, 10))
def test_percentiles_leave_as_many_below_as_they_say(values: list[float], factor: float) -> None:
    found = spread(values)
    assert found is not None
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.99, found.p99)):
        assert sum(each <= value for each in values) >= int(share * (len(values) - 1)) + 1
        assert sum(each >= value for each in values) >= int((1 - share) * (len(values) - 1)) + 1


def test_percentiles_of_a_hundred_and_of_nothing() -> None:
    found = spread([float(each) for each in range(101)])
    assert found is not None
    assert (found.p50, found.p90, found.p99) == (50, 90, 99)
    assert spread([]) is None


def test_classes_are_told_apart() -> None:
    records = [
        record(wait=0.2, gaps=(0.01, 0.03), sent=1.0),
        record(wait=0.4, gaps=(0.02,), sent=2.0, verdict=Verdict.WRONG),
        record(wait=1.5, gaps=(), kind="8K", tokens=8_000, sent=2.0),
        record(wait=2.5, gaps=(), kind="8K", tokens=8_000, sent=3.0, verdict=Verdict.UNCHECKED),
        failed(FailureKind.STATUS, 503, kind="8K", tokens=8_000),
        failed(FailureKind.STATUS, 503, kind="8K", tokens=8_000),
        failed(FailureKind.TIMEOUT, kind="8K", tokens=8_000),
    ]
    summary = summarize(records, ["1K", "8K", "64K"], SLO)
    short, long, none = summary.kinds
    assert (short.requests, short.right, short.wrong, short.failed, short.good) == (2, 1, 1, 0, 1)
    assert (long.requests, long.right, long.unchecked, long.failed, long.good) == (5, 1, 1, 3, 1)
    assert long.errors == {"status 503": 2, "timeout": 1}
    assert (short.good_share, long.good_share, none.good_share) == (0.5, 0.2, 0.0)
    assert short.first_token is not None
    assert short.first_token.p50 == pytest.approx(0.3)
    assert short.inter_token is not None
    assert short.inter_token.p50 == pytest.approx(0.02)
    assert short.per_token is not None
    assert short.per_token.p50 == pytest.approx(0.02)
    assert short.end_to_end is not None
    assert short.end_to_end.p50 == pytest.approx((0.24 + 0.42) / 2)
    assert long.first_token is not None
    assert long.first_token.p50 == pytest.approx(2.0), "of those that came whole"
    assert (none.requests, none.first_token) == (0, None)
    assert (summary.whole.requests, summary.whole.good, summary.whole.answer_tokens) == (7, 2, 7)


def test_rates_are_over_all_the_time_from_the_first_request_to_the_last_end() -> None:
    records = [record(wait=1.0, gaps=(), sent=2.0), record(wait=0.5, gaps=(0.01,), sent=5.49)]
    summary = summarize(records, ["1K"], SLO)
    assert summary.seconds == pytest.approx(4.0)
    assert summary.good_per_second == pytest.approx(0.5)
    assert summary.answer_tokens_per_second == pytest.approx(0.75)
    assert summarize([], ["1K"], SLO).good_per_second == 0


def test_every_class_must_hold() -> None:
    good = [record() for _ in range(19)]
    long = record(wait=1.0, gaps=(), kind="8K", tokens=8_000)
    late = record(wait=3.0, gaps=(), kind="8K", tokens=8_000)
    assert summarize([*good, long], ["1K", "8K"], SLO).holds(1.0)
    assert summarize([*good, record(wait=2.0), long], ["1K", "8K"], SLO).holds(0.95)
    assert not summarize([*good, record(wait=2.0), long], ["1K", "8K"], SLO).holds(0.96)
    assert not summarize([*good, late], ["1K", "8K"], SLO).holds(0.95)
