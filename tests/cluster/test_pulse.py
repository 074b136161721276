"""A process that others depend on is found when it dies or hangs, and not before."""

import asyncio
import gc
import itertools
from collections.abc import Callable

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from longreach.cluster.pulse import (
    BUSY_MISSES,
    IDLE_MISSES,
    Allowance,
    Pulse,
    Reading,
    watch,
)

TICK = 0.001
WELL = Reading(0.0, 0.0)


def test_a_pulse_knows_the_oldest_piece_under_way_and_the_slowest() -> None:
    now = [100.0]
    pulse = Pulse(lambda: now[0])
    assert pulse.read() == Reading(0.0, 0.0)
    with pulse.piece():
        now[0] += 3
        with pulse.piece():
            now[0] += 4
            assert pulse.read() == Reading(7.0, 0.0)
        assert pulse.read() == Reading(7.0, 4.0)
    assert pulse.read() == Reading(0.0, 7.0)


def test_a_piece_that_fails_is_over() -> None:
    pulse = Pulse()
    with pytest.raises(ZeroDivisionError), pulse.piece():
        raise ZeroDivisionError
    assert pulse.read().running == 0


@pytest.mark.parametrize(
    ("running", "slowest", "allowance", "exceeded"),
    [
        (11.9, 2.0, Allowance(10.0), False),
        (12.1, 2.0, Allowance(10.0), True),
        (18.1, 2.0, Allowance(10.0, times=4.0), True),
        (39.0, 2.0, Allowance(10.0, slowest_at_least=30.0), False),
    ],
)
def test_a_piece_may_take_as_long_as_the_slowest_and_some_more(
    running: float, slowest: float, allowance: Allowance, exceeded: bool
) -> None:
    assert allowance.is_exceeded(Reading(running, slowest)) is exceeded


class Process:
    """Answers as told: a reading, an error, or never."""

    def __init__(self, *answers: Reading | Exception | None) -> None:
        self.asked = 0
        self._answers = itertools.chain(answers, itertools.repeat(answers[-1]))

    async def read(self) -> Reading:
        self.asked += 1
        answer = next(self._answers)
        if answer is None:
            await asyncio.Event().wait()
        if isinstance(answer, Exception):
            raise answer
        assert isinstance(answer, Reading)
        return answer


def watched(process: Process, is_busy: Callable[[], bool], seconds: float = 5) -> str:
    looking = watch(process.read, is_busy, Allowance(), TICK)
    return asyncio.run(asyncio.wait_for(looking, seconds))


def test_a_dead_process_is_found() -> None:
    assert "ActorDiedError" in watched(Process(WELL, WELL, ActorDiedError()), lambda: False)


def test_one_that_answers_while_its_work_stands_still_is_found() -> None:
    process = Process(WELL, Reading(9.0, 1.0), Reading(12.0, 1.0), Reading(13.0, 1.0))
    assert "13 s" in watched(process, lambda: True)
    assert process.asked == 4


def test_a_machine_that_was_frozen_for_a_while_is_forgiven() -> None:
    """It wakes to an old piece of work, which then ends."""
    process = Process(Reading(99.0, 1.0), WELL)
    with pytest.raises(TimeoutError):
        watched(process, lambda: True, seconds=0.1)


@pytest.mark.parametrize(("busy", "misses"), [(True, BUSY_MISSES), (False, IDLE_MISSES)])
def test_silence_is_a_hang_sooner_where_there_is_work(busy: bool, misses: int) -> None:
    process = Process(WELL, None)
    assert f" {misses} " in watched(process, lambda: busy)
    assert process.asked == 2, "asked once more only when it has answered"


@pytest.mark.parametrize("seconds", [0.0005, 0.0015])
def test_whoever_stops_watching_leaves_no_error_unread(
    caplog: pytest.LogCaptureFixture, seconds: float
) -> None:
    """Asked and not answered yet, or answered and not looked at."""

    async def run() -> None:
        looking = asyncio.create_task(watch(dies, lambda: True, Allowance(), 0.001))
        await asyncio.sleep(seconds)
        looking.cancel()
        await asyncio.wait({looking})
        await asyncio.sleep(0.01)
        del looking
        gc.collect()

    async def dies() -> Reading:
        await asyncio.sleep(0.001)
        raise ActorDiedError

    asyncio.run(run())
    assert not [each for each in caplog.records if "never retrieved" in each.getMessage()]


def test_a_broken_connection_is_no_death() -> None:
    process = Process(ActorUnavailableError("", None), WELL)
    with pytest.raises(TimeoutError):
        watched(process, lambda: True, seconds=0.1)
    assert process.asked > 2


def test_one_that_stays_out_of_reach_is_given_up() -> None:
    process = Process(WELL, ActorUnavailableError("", None))
    assert f" {IDLE_MISSES} " in watched(process, lambda: True)


def test_what_was_missed_while_idle_does_not_count_once_there_is_work() -> None:
    """A starved idle process is alive, and its first request is not its end."""
    process = Process(WELL, None)
    ticks = itertools.count()
    # Idle for longer than a busy one may be silent; then there is work.
    result = watched(process, lambda: next(ticks) > 2 * BUSY_MISSES)
    assert f" {BUSY_MISSES} " in result
    assert next(ticks) >= 3 * BUSY_MISSES
