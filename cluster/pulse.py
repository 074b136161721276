"""Whether a process that others depend on still gets on with its work.

Health is progress. A process says how long what it is doing has taken so far (`Pulse`), from a
thread or an event loop that its work does not hold up; whoever started it asks again and again
(`watch`). A process that was stopped, or is out of reach, does not answer. One that answers while
its work stands still has hung as well.

A missing answer proves little where there is no work: a machine may be starved for seconds. So an
idle process may miss many, and a busy one few.
"""

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.exceptions import ActorUnavailableError, RayError

TICK_SECONDS = 1.0
BUSY_MISSES = 8
"""Ticks without an answer after which a process that has work is taken to hang."""
IDLE_MISSES = 60
"""The same for one that has none. Serve's own checks find processes that died."""


@dataclass(frozen=True)
class Reading:
    """Seconds that the oldest piece of work under way has taken, and that the slowest took."""

    running: float
    slowest: float


class Pulse:
    """Times the pieces of a process's work. Safe to use from several threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._numbers = itertools.count()
        self._began: dict[int, float] = {}
        self._slowest = 0.0

    @contextmanager
    def piece(self) -> Iterator[None]:
        """One piece of work: a chunk, a step, a message's copies."""
        number = next(self._numbers)
        began = self._began[number] = self._clock()
        try:
            yield
        finally:
            del self._began[number]
            self._slowest = max(self._slowest, self._clock() - began)

    def read(self) -> Reading:
        """How it stands now."""
        now = self._clock()
        running = max((now - began for began in list(self._began.values())), default=0.0)
        return Reading(running, self._slowest)


@dataclass(frozen=True)
class Allowance:
    """How long a piece of work may take: `times` the slowest that was seen, and `seconds` more.

    `slowest_at_least` stands for the slowest until one that slow was seen.
    """

    seconds: float = 10.0
    times: float = 1.0
    slowest_at_least: float = 0.0

    def is_exceeded(self, reading: Reading) -> bool:
        """Whether what is under way takes longer than it may."""
        slowest = max(reading.slowest, self.slowest_at_least)
        return reading.running > self.times * slowest + self.seconds


async def watch(
    read: Callable[[], Awaitable[Reading]],
    is_busy: Callable[[], bool],
    allowance: Allowance,
    tick_seconds: float = TICK_SECONDS,
) -> str:
    """Ask a process for its pulse until it has died or hangs; returns which of these, in words.

    Args:
        read: asks once.
        is_busy: whether it has been given work.
    """
    asking = _Asking(read)
    try:
        return await _watch(asking, is_busy, allowance, tick_seconds)
    finally:
        asking.end()


class _Asking:
    """One question at a time: a process that answers late is not asked meanwhile."""

    def __init__(self, read: Callable[[], Awaitable[Reading]]) -> None:
        self._read = read
        self._asked: asyncio.Future[Reading] | None = None

    async def answered(self, seconds: float) -> bool:
        """Whether there is an answer after so many seconds, to a new question or the last one."""
        self._asked = self._asked or asyncio.ensure_future(self._read())
        await asyncio.wait({self._asked}, timeout=seconds)
        return self._asked.done()

    def answer(self) -> Reading:
        """What was answered, or raised; the next question is another one."""
        assert self._asked is not None
        answered, self._asked = self._asked, None
        return answered.result()

    def end(self) -> None:
        """Ask no more, and leave no error behind that nobody has read."""
        if self._asked is not None and not self._asked.cancel() and not self._asked.cancelled():
            self._asked.exception()


async def _watch(
    asking: _Asking, is_busy: Callable[[], bool], allowance: Allowance, tick_seconds: float
) -> str:
    missed, exceeded, was_busy = 0, 0, False
    while True:
        busy = is_busy()
        if busy and not was_busy:
            missed = 0  # What an idle process missed proves nothing about one that has work.
        was_busy = busy
        if not await asking.answered(tick_seconds):
            # Counted in ticks of this process: where the whole machine is starved, they are late.
            missed += 1
            if missed >= (BUSY_MISSES if busy else IDLE_MISSES):
                return f"did not answer for {missed} ticks"
            continue
        await asyncio.sleep(tick_seconds)
        try:
            reading = asking.answer()
        except ActorUnavailableError:
            # A connection broke, and Ray makes another: nobody has died, and nobody has answered.
            missed += 1
            if missed >= IDLE_MISSES:
                return f"was out of reach for {missed} ticks"
            continue
        except RayError as error:
            return f"died ({type(error).__name__})"
        missed = 0
        # Twice in a row: a machine that was frozen wakes to an old piece of work, which then ends.
        exceeded = exceeded + 1 if allowance.is_exceeded(reading) else 0
        if exceeded == 2:
            return f"has been at one piece of work for {reading.running:.0f} s"
