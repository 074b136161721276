"""What the commands show: prefill progress as it happens, and where the time went."""

import time
from abc import ABC, abstractmethod
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from ...engine.messages import Progress as PrefillProgress

_LINE_EVERY_SECONDS = 5.0


class Watch(ABC):
    """Shows how far a prefill is, until it is closed."""

    @abstractmethod
    def update(self, progress: PrefillProgress) -> None:
        """Show this progress, or leave it out where the last one is fresh enough."""

    @abstractmethod
    def close(self) -> None:
        """Stop showing; what is printed next starts on a line of its own. May come again."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def watch_prefill(console: Console) -> Watch:
    """A live bar on a terminal, now and then a line elsewhere."""
    return _Bar(console) if console.is_terminal else _Lines(console)


class _Bar(Watch):
    def __init__(self, console: Console) -> None:
        self._bar = Progress(
            TextColumn("prefill"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.fields[tokens]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("prefill", total=None, tokens="waiting")
        self._started = time.monotonic()
        self._bar.start()

    def update(self, progress: PrefillProgress) -> None:
        tokens = _describe(progress, time.monotonic() - self._started)
        self._bar.update(self._task, total=progress.total, completed=progress.done, tokens=tokens)

    def close(self) -> None:
        self._bar.stop()


class _Lines(Watch):
    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._next = 0.0

    def update(self, progress: PrefillProgress) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed < self._next and progress.done < progress.total:
            return
        self._next = elapsed + _LINE_EVERY_SECONDS
        percent = 100 * progress.done // max(progress.total, 1)
        self._console.print(f"prefill {percent} %  {_describe(progress, elapsed)}, {elapsed:.0f} s")

    def close(self) -> None:
        """Lines end by themselves."""


def _describe(progress: PrefillProgress, seconds: float) -> str:
    rate = progress.done / max(seconds, 1e-3)
    return f"{progress.done:,} of {progress.total:,} tokens, {rate:,.0f} tokens/s"


def seconds_table(title: str, rows: list[tuple[str, float]], total: float) -> Table:
    """Names and seconds, with the share that each has in `total`."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in rows:
        table.add_row(name, f"{seconds:,.3f}", f"{100 * seconds / total:.1f} %" if total else "")
    return table
