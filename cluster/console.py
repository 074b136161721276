"""What the commands show: prefill progress as it happens, and where the time went."""

import time
from types import TracebackType
from typing import Protocol

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

from ..engine.messages import Progress as PrefillProgress

_LINE_EVERY_SECONDS = 5.0


class Watch(Protocol):
    """A context that is told how far a prefill is."""

    def update(self, progress: PrefillProgress) -> None: ...
    def __enter__(self) -> "Watch": ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def watch_prefill(console: Console, tokens: int) -> Watch:
    """A live bar on a terminal, now and then a line elsewhere."""
    return _Bar(console, tokens) if console.is_terminal else _Lines(console)


class _Bar:
    def __init__(self, console: Console, tokens: int) -> None:
        self._bar = Progress(
            TextColumn("prefill"),
            BarColumn(),
            TaskProgressColumn(),
            TextColumn("{task.completed:,.0f} of {task.total:,.0f} tokens"),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task("prefill", total=tokens, rate="")
        self._started = time.monotonic()

    def update(self, progress: PrefillProgress) -> None:
        rate = progress.done / max(time.monotonic() - self._started, 1e-3)
        self._bar.update(
            self._task, total=progress.total, completed=progress.done, rate=f"{rate:,.0f} tokens/s"
        )

    def __enter__(self) -> "_Bar":
        self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._bar.stop()


class _Lines:
    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = time.monotonic()
        self._next = 0.0

    def update(self, progress: PrefillProgress) -> None:
        elapsed = time.monotonic() - self._started
        if elapsed < self._next and progress.done < progress.total:
            return
        self._next = elapsed + _LINE_EVERY_SECONDS
        self._console.print(
            f"prefill {100 * progress.done // max(progress.total, 1):3d} %  "
            f"{progress.done:,} of {progress.total:,} tokens, "
            f"{progress.done / max(elapsed, 1e-3):,.0f} tokens/s, {elapsed:.0f} s"
        )

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


def seconds_table(title: str, rows: list[tuple[str, float]], total: float) -> Table:
    """Names and seconds, with the share that each has in `total`."""
    table = Table(title=title, title_justify="left")
    table.add_column("what")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in rows:
        table.add_row(name, f"{seconds:,.3f}", f"{100 * seconds / total:.1f} %" if total else "")
    return table
