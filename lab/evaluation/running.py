"""Asks every prompt of a grid once, and shows how far it is."""

import platform
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from ...engine.messages import Progress as PrefillProgress
from .answerer import Answerer, TokenCount
from .records import Record, RecordFile
from .summary import Cell
from .tasks import Prompt, Task

_LONG = 131_072


@dataclass(frozen=True)
class Grid:
    """What to ask: every task at every length and depth, with `prompts` seeds in a cell.

    Lengths above 131,072 tokens get `long_prompts` instead. A depth of None is anywhere.

    Raises:
        InvalidRequestError: a task cannot have one of the depths.
    """

    tasks: Sequence[Task]
    lengths: Sequence[int]
    depths: Sequence[float | None]
    prompts: int
    long_prompts: int
    first_seed: int = 0

    def __post_init__(self) -> None:
        for task in self.tasks:
            for depth in self.depths:
                task.check_depth(depth)

    def seeds(self, tokens: int) -> range:
        """The seeds of a cell."""
        count = self.prompts if tokens <= _LONG else self.long_prompts
        return range(self.first_seed, self.first_seed + count)

    def points(self) -> Iterator[tuple[int, Task, float | None, int]]:
        """Length, task, depth and seed of every prompt; short ones first."""
        for tokens in self.lengths:
            for task in self.tasks:
                for depth in self.depths:
                    for seed in self.seeds(tokens):
                        yield tokens, task, depth, seed


def run(answerer: Answerer, grid: Grid, file: RecordFile, console: Console) -> None:
    """Ask what the file has no record of. Every variant is asked the same prompts.

    Raises:
        LongreachError: a prompt cannot be made or answered; what was answered is in the file.
    """
    known = {record.key for record in file.records}
    points = [
        (point, variant)
        for point in grid.points()
        for variant in answerer.variants
        if (point[1].name, variant, point[0], point[2], point[3]) not in known
    ]
    prompts = _Prompts(answerer)
    versions = _versions()
    with _Bars(console, len(known), len(points)) as bars:
        for index, ((tokens, task, depth, seed), variant) in enumerate(points):
            bars.start(task.name, tokens, variant)
            prompt = prompts.of(tokens, task, depth, seed)
            started = time.perf_counter()
            answer = answerer.answer(
                variant, prompt.content, task.most_answer_tokens(prompt), bars.prefilled
            )
            seconds = round(time.perf_counter() - started, 3)
            file.append(
                Record(
                    task=task.name,
                    variant=variant,
                    tokens=tokens,
                    depth=depth,
                    seed=seed,
                    prompt_tokens=answer.prompt_tokens,
                    expected=prompt.expected,
                    answered=answer.text,
                    score=task.score(answer.text, prompt.expected),
                    seconds=seconds,
                    model=answerer.model,
                    versions=versions,
                )
            )
            bars.finish()
            following = points[index + 1][0][:2] if index + 1 < len(points) else None
            if following != (tokens, task):
                _show_cells(file, answerer.variants, task.name, tokens, bars.console)


class _Prompts:
    """Makes prompts, and keeps the last: variants share it."""

    def __init__(self, answerer: Answerer) -> None:
        self._answerer = answerer
        self._counters: dict[str, TokenCount] = {}
        self._last: tuple[object, Prompt] | None = None

    def of(self, tokens: int, task: Task, depth: float | None, seed: int) -> Prompt:
        key = (tokens, task.name, depth, seed)
        if self._last is None or self._last[0] != key:
            self._last = key, task.prompt(tokens, seed, depth, self._counter(task))
        return self._last[1]

    def _counter(self, task: Task) -> TokenCount:
        """A counter for this task's text, which may have other tokens than another's."""
        if task.name not in self._counters:
            self._counters[task.name] = self._answerer.counter(task.sample())
        return self._counters[task.name]


class _Bars:
    """A bar for all prompts and one for the prefill of the present one."""

    def __init__(self, console: Console, done: int, missing: int) -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._all = self._progress.add_task("prompts", total=done + missing, completed=done)
        self._one = self._progress.add_task("", total=None)
        self.console = console

    def __enter__(self) -> "_Bars":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def start(self, task: str, tokens: int, variant: str) -> None:
        self._progress.reset(self._one, total=tokens, description=f"{task}, {variant}")

    def prefilled(self, progress: PrefillProgress) -> None:
        self._progress.update(self._one, completed=progress.done, total=progress.total)

    def finish(self) -> None:
        self._progress.advance(self._all)


def _show_cells(
    file: RecordFile, variants: Sequence[str], task: str, tokens: int, console: Console
) -> None:
    for variant in variants:
        wanted = (task, variant, tokens)
        records = [r for r in file.records if (r.task, r.variant, r.tokens) == wanted]
        cell = Cell.of(records)
        seconds = sum(record.seconds for record in records)
        console.print(
            f"{task:16} {tokens:>9,} tokens  {variant:14}  {cell.described()}  {seconds:,.0f} s",
            highlight=False,
            soft_wrap=True,
        )


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("longreach", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found
