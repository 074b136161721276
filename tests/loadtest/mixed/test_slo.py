"""What makes an answer a good one."""

from dataclasses import replace

import pytest

from longreach.loadtest.mixed.record import Verdict
from longreach.loadtest.mixed.slo import DEFAULT_WAITS, Slo

from .records import failed, record

SLO = Slo.parse("1K=1,8K=2", per_token=0.02)


def test_a_limit_is_for_lengths_up_to_it() -> None:
    assert [SLO.wait(tokens) for tokens in (1, 1_024, 1_025, 8_192)] == [1, 1, 2, 2]
    assert [SLO.class_of(tokens) for tokens in (1, 1_024, 1_025)] == ["to 1K", "to 1K", "to 8K"]
    with pytest.raises(ValueError, match="--slo"):
        SLO.wait(8_193)


def test_the_default_has_a_limit_for_a_million() -> None:
    assert Slo.parse(DEFAULT_WAITS, 0.1).wait(1 << 20) == 60


def test_scaled_limits_are_for_scaled_lengths() -> None:
    scaled = SLO.scaled(1 / 8)
    assert scaled.lengths == (128, 1_024)
    assert (scaled.waits, scaled.per_token) == (SLO.waits, SLO.per_token)


def test_a_good_answer_is_whole_not_wrong_and_in_time() -> None:
    good = record(wait=1.0, gaps=(0.01, 0.03))
    assert SLO.is_met_by(good)
    assert SLO.is_met_by(replace(good, verdict=Verdict.UNCHECKED))
    assert not SLO.is_met_by(replace(good, verdict=Verdict.WRONG))
    assert not SLO.is_met_by(replace(good, first_token=1.001))
    assert not SLO.is_met_by(replace(good, gaps=(0.02, 0.021)))
    assert not SLO.is_met_by(failed())


def test_a_longer_prompt_may_wait_longer() -> None:
    assert SLO.is_met_by(record(wait=1.5, gaps=(), tokens=8_000))
    assert not SLO.is_met_by(record(wait=1.5, gaps=(), tokens=1_000))


def test_a_tokens_time_is_by_the_tokens_that_the_endpoint_counted() -> None:
    """A text may hold several."""
    answer = record(gaps=(0.06,))
    assert answer.per_token == pytest.approx(0.06)
    assert replace(answer, answer_tokens=4).per_token == pytest.approx(0.02)
    assert replace(answer, answer_tokens=None).per_token == pytest.approx(0.06)
    assert replace(answer, answer_tokens=1, gaps=()).per_token is None


@pytest.mark.parametrize("text", ["", "1K", "1K=0", "1K=inf", "1K=nan", "=1", "1K=1,1024=2"])
def test_what_is_no_limit_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        Slo.parse(text, 0.1)


def test_a_token_must_be_given_time() -> None:
    with pytest.raises(ValueError, match="token"):
        Slo.parse("1K=1", 0.0)
