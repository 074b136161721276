"""Measurements against one endpoint: with one load, or with one after the other."""

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import count

from ..endpoint import Endpoint
from ..prompts import TextSize
from .measure import Watch, measure
from .plan import ClosedLoad, Load, OpenLoad, Plan
from .prepare import prepare
from .record import Ask, Record
from .slo import Slo
from .summary import Summary, summarize
from .sweep import Step, search, value_of, with_load
from .workload import Workload

_WARM_UP_SEED = 1 << 32

Watcher = Callable[[Plan], AbstractContextManager[Watch]]
"""Gives what is told of a plan's requests while they are sent."""


class NotAnsweredError(Exception):
    """The endpoint answers nothing of what it is asked, so that there is nothing to measure."""


@dataclass(frozen=True)
class Result:
    """One load, all that was sent, and what came of it."""

    plan: Plan
    records: list[Record]
    summary: Summary


class Runner:
    """Asks one endpoint. SIGINT and SIGTERM end a measurement, and what came by then counts."""

    def __init__(self, endpoint: Endpoint, workload: Workload, size: TextSize) -> None:
        self._endpoint = endpoint
        self._workload = workload
        self._size = size
        self._asked_to_end = False
        self._warm_up_seeds = count(_WARM_UP_SEED)

    def warm_up(self, prompts: int) -> None:
        """Ask a few of the shortest prompts, which do not count.

        Raises:
            NotAnsweredError: none of them was answered.
            KeyboardInterrupt: it was asked to end meanwhile.
        """
        plan = self._workload.plan_warm_up(prompts)
        records = self._measure(plan, next(self._warm_up_seeds), _Nobody(), asyncio.Event())
        if self._asked_to_end:
            raise KeyboardInterrupt
        failures = [record.failure for record in records if record.failure is not None]
        if failures and len(failures) == len(records):
            raise NotAnsweredError(f"{failures[0].name}: {failures[0].said}")

    def run(self, load: Load, watcher: Watcher) -> Result:
        """Measure with one load."""
        plan = self._workload.plan(load)
        with watcher(plan) as watch:
            records = self._measure(plan, self._workload.seed, watch, asyncio.Event())
        return Result(plan, records, summarize(records, plan.kinds, self._workload.slo))

    def sweep(
        self,
        first: OpenLoad | ClosedLoad,
        steps: int,
        hold: float,
        watcher: Watcher,
        tell: Callable[[Step], None],
    ) -> None:
        """Try loads until the highest one that holds the SLO is found; `tell` is told of each.

        A try has prompts of its own, and ends as soon as too many answers are bad. Before the next
        one a short prompt must have been answered, so that none inherits the load of another.

        Args:
            first: the load to begin with.
            steps: loads to try at most.
            hold: the share of good answers that every class must have.

        Raises:
            NotAnsweredError: not even a short prompt was answered after a try.
            KeyboardInterrupt: it was asked to end.
        """
        numbers = count()

        def holds(value: float) -> bool:
            number = next(numbers)
            if number:
                self.warm_up(1)
            step = self._try(with_load(first, value), number, hold, watcher)
            if self._asked_to_end:
                raise KeyboardInterrupt
            tell(step)
            return step.holds

        search(holds, value_of(first), steps, isinstance(first, ClosedLoad))

    def _try(self, load: OpenLoad | ClosedLoad, number: int, hold: float, watcher: Watcher) -> Step:
        plan = self._workload.plan(load, number)
        stop = asyncio.Event()
        with watcher(plan) as watch:
            judge = _Judge(watch, plan, self._workload.slo, hold, stop)
            records = self._measure(plan, self._workload.seed + number, judge, stop)
        summary = summarize(records, plan.kinds, self._workload.slo)
        return Step(value_of(load), summary.holds(hold), summary)

    def _measure(self, plan: Plan, seed: int, watch: Watch, stop: asyncio.Event) -> list[Record]:
        prepared = prepare(plan, self._endpoint, self._size, self._workload.style, seed)

        def end() -> None:
            self._asked_to_end = True
            stop.set()

        async def run() -> list[Record]:
            with _when_asked_to_end(end):
                return await measure(plan, prepared, self._endpoint, watch, stop)

        return asyncio.run(run())


class _Nobody:
    """Watches nothing."""

    def sent(self, ask: Ask) -> None: ...

    def ended(self, record: Record) -> None: ...


class _Judge:
    """Passes on what it is told, and stops once a class can no longer hold the SLO."""

    def __init__(
        self, watch: Watch, plan: Plan, slo: Slo, hold: float, stop: asyncio.Event
    ) -> None:
        self._watch, self._slo, self._hold, self._stop = watch, slo, hold, stop
        self._planned = Counter(ask.kind for ask in plan.asks)
        self._bad: Counter[str] = Counter()

    def sent(self, ask: Ask) -> None:
        self._watch.sent(ask)

    def ended(self, record: Record) -> None:
        self._watch.ended(record)
        kind, planned = record.ask.kind, self._planned[record.ask.kind]
        self._bad[kind] += not self._slo.is_met_by(record)
        if (planned - self._bad[kind]) / planned < self._hold:
            self._stop.set()


@contextmanager
def _when_asked_to_end(end: Callable[[], None]) -> Iterator[None]:
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, end)
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)
