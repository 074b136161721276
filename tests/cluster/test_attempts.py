"""What becomes of a request when what serves it dies: pure bookkeeping."""

import pickle
from typing import Any

import numpy as np
import pytest

from longreach.cluster.attempts import Attempts
from longreach.cluster.recovery import RECOVERY_SECONDS
from longreach.engine.errors import (
    InvalidRequestError,
    LongreachError,
    LostError,
    NotUpError,
    PoisonousError,
    QueueFullError,
    TransferError,
    UnavailableError,
)
from longreach.engine.messages import (
    ChosenToken,
    Delta,
    Finished,
    GenerationRequest,
    Progress,
    SamplingParameters,
    Timings,
)

LOST, NOT_UP = LostError("it died"), NotUpError("it is not up")


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def make_request(**sampling: Any) -> GenerationRequest:
    prompt = np.arange(5, dtype=np.int32)
    return GenerationRequest("a", prompt, SamplingParameters(max_tokens=8, **sampling), arrived=0.0)


def delta(*tokens: int, choice: int = 0, end: str | None = None) -> Delta:
    return Delta(choice, "x" * len(tokens), tuple(ChosenToken(t, -0.5) for t in tokens), end)


def test_a_later_attempt_has_another_name_the_same_seed_and_what_the_client_has() -> None:
    attempts = Attempts(make_request(choices=2), retries=2)
    first = attempts.request
    assert first.request_id == "a"
    assert first.sampling.seed is not None
    assert (first.origin, first.computed) == ("a", 0)
    for event in (Progress(1, 5), delta(1), delta(2, 3, choice=1), delta(4)):
        assert attempts.hear(event) == event
    attempts.failed(LOST)
    second = attempts.request
    assert second.sampling == first.sampling
    assert second.prompt is first.prompt
    assert second.replayed == ((1, 4), (2, 3))
    assert (second.origin, second.computed) == ("a", 5)
    attempts.hear(delta(5))
    attempts.failed(LOST)
    assert attempts.request.replayed == ((1, 4, 5), (2, 3))
    assert len({"a", second.request_id, attempts.request.request_id}) == 3


def test_a_seed_that_was_asked_for_stays() -> None:
    assert Attempts(make_request(seed=7), retries=1).request.sampling.seed == 7


def test_a_choice_ends_once_and_all_its_tokens_are_counted() -> None:
    attempts = Attempts(make_request(choices=2), retries=2)
    attempts.hear(delta(1, 2, end="stop"))
    attempts.hear(delta(3, choice=1))
    attempts.failed(LOST)
    assert attempts.hear(Delta(0, "", (), "stop")) is None
    last = delta(4, choice=1, end="length")
    assert attempts.hear(last) == last
    heard = attempts.hear(Finished(5, 1, Timings(0, 0, 0, 0, 0)))
    assert isinstance(heard, Finished)
    assert heard.completion_tokens == 4


@pytest.mark.parametrize("error", [LOST, TransferError("the worker is gone")])
def test_one_death_too_many_refuses_the_request(error: LongreachError) -> None:
    attempts = Attempts(make_request(), retries=2)
    attempts.hear(Progress(2, 5))
    attempts.hear(delta(1))
    attempts.failed(error)
    # Its prompt is computed again, and it gets no further.
    attempts.hear(Progress(4, 5))
    attempts.failed(error)
    with pytest.raises(PoisonousError) as refused:
        attempts.failed(error)
    assert refused.value.deaths == 3


@pytest.mark.parametrize("reached", [Progress(3, 5), delta(1)], ids=["prompt", "answer"])
def test_deaths_at_other_places_are_chance(reached: Progress | Delta) -> None:
    attempts = Attempts(make_request(), retries=1)
    attempts.failed(LOST)
    attempts.hear(reached)
    attempts.failed(LOST)
    with pytest.raises(PoisonousError) as refused:
        attempts.failed(LOST)
    assert refused.value.deaths == 2


def test_a_process_that_had_not_begun_on_it_was_not_killed_by_it() -> None:
    attempts = Attempts(make_request(), retries=1)
    for _ in range(5):
        attempts.failed(pickle.loads(pickle.dumps(LostError("it died", begun=False))))


def test_what_is_not_up_is_waited_for_and_is_no_death() -> None:
    clock = Clock()
    attempts = Attempts(make_request(), retries=1, clock=clock)
    attempts.failed(LOST)
    waits = []
    while clock.now < RECOVERY_SECONDS - 2:
        waits.append(attempts.failed(NOT_UP))
        clock.now += waits[-1]
    assert waits == sorted(waits)
    assert 0 < waits[0] < waits[-1] <= 2
    clock.now = RECOVERY_SECONDS + 1
    with pytest.raises(NotUpError):
        attempts.failed(NOT_UP)


def test_the_wait_begins_anew_once_something_came() -> None:
    clock = Clock()
    attempts = Attempts(make_request(), retries=5, clock=clock)
    for _ in range(4):
        attempts.failed(NOT_UP)
        clock.now += RECOVERY_SECONDS - 1
        attempts.hear(delta(1))


def test_a_full_queue_refuses_whoever_comes_and_nobody_who_was_there() -> None:
    full = QueueFullError(3)
    with pytest.raises(QueueFullError):
        Attempts(make_request(), retries=2).failed(full)
    attempts = Attempts(make_request(), retries=2)
    attempts.failed(LOST)
    attempts.failed(full)


@pytest.mark.parametrize(
    "error", [InvalidRequestError("no"), UnavailableError("the request was released")]
)
def test_what_another_attempt_cannot_help_is_told(error: LongreachError) -> None:
    with pytest.raises(type(error)):
        Attempts(make_request(), retries=2).failed(error)


@pytest.mark.parametrize("error", [LOST, NOT_UP])
def test_without_retries_nothing_is_waited_for(error: LongreachError) -> None:
    with pytest.raises(type(error)):
        Attempts(make_request(), retries=0).failed(error)
