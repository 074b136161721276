"""How a measurement goes, while it goes."""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.live import Live
from rich.table import Table

from .measure import Watch
from .plan import Plan
from .record import Ask, Record
from .slo import Slo
from .summary import spread
from .table import new_table, spread_text

_PER_SECOND = 2.0
_LINE_SECONDS = 5.0


class Board:
    """Counts of what has happened by now, by class."""

    def __init__(self, plan: Plan, slo: Slo, changed: Callable[[], None] = lambda: None) -> None:
        self._plan, self._slo, self._changed = plan, slo, changed
        self._planned = Counter(ask.kind for ask in plan.asks)
        self._sent: Counter[str] = Counter()
        self._ended: Counter[str] = Counter()
        self._good: Counter[str] = Counter()
        self._failed: Counter[str] = Counter()
        self._waits: dict[str, list[float]] = {kind: [] for kind in plan.kinds}
        self._started = time.monotonic()

    def sent(self, ask: Ask) -> None:
        """Count it."""
        self._sent[ask.kind] += 1
        self._changed()

    def ended(self, record: Record) -> None:
        """Count it."""
        kind = record.ask.kind
        self._ended[kind] += 1
        self._good[kind] += self._slo.is_met_by(record)
        self._failed[kind] += record.failure is not None
        if record.first_token is not None:
            self._waits[kind].append(record.first_token)
        self._changed()

    def __rich__(self) -> Table:
        seconds = time.monotonic() - self._started
        title = f"{seconds:.0f} s, {self._plan.load} (p50 p90 p99)"
        counts = ("planned", "under way", "ended", "good", "failed")
        made = new_table(title, "prompts", *counts, "first token s")
        for kind in self._plan.kinds:
            waited = spread_text(spread(self._waits[kind]))
            made.add_row(kind, *map(str, self._counts(kind)), waited)
        return made

    def line(self) -> str:
        """All classes in a line."""
        sent, ended, good, failed = (
            each.total() for each in (self._sent, self._ended, self._good, self._failed)
        )
        return (
            f"{time.monotonic() - self._started:.0f} s: {sent - ended} under way, {ended} of "
            f"{len(self._plan.asks)} ended, {good} good, {failed} failed"
        )

    def _counts(self, kind: str) -> tuple[int, int, int, int, int]:
        under_way = self._sent[kind] - self._ended[kind]
        ended, good, failed = self._ended[kind], self._good[kind], self._failed[kind]
        return self._planned[kind], under_way, ended, good, failed


@contextmanager
def watching(plan: Plan, slo: Slo, console: Console) -> Iterator[Watch]:
    """A live table on a terminal, now and then a line elsewhere."""
    if not console.is_terminal:
        yield _lines(plan, slo, console)
        return
    board = Board(plan, slo)
    with Live(board, console=console, refresh_per_second=_PER_SECOND, transient=True):
        yield board


def _lines(plan: Plan, slo: Slo, console: Console) -> Board:
    said = time.monotonic()

    def say() -> None:
        nonlocal said
        if time.monotonic() - said >= _LINE_SECONDS:
            said = time.monotonic()
            console.print(board.line(), markup=False)

    board = Board(plan, slo, say)
    return board
