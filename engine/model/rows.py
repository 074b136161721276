"""How many rows of hidden states are computed at once."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from ...kernels.narrow import NarrowRows, Rows

T = TypeVar("T", bound=Rows)
Result = TypeVar("Result")

_CPU_ROWS = 2048
"""Whole blocks of 128. What a whole chunk leaves in between would outgrow a CPU's caches."""


_TURNS, _LEAST_ROWS_OF_A_TURN, _BLOCK = 4, 1024, 128
"""What waits for the last turn is not hidden, and fewer rows are slower products."""


@dataclass(frozen=True)
class RowSteps:
    """Rows in the slices that are computed one after the other; at least one slice."""

    slices: tuple[slice, ...]

    @classmethod
    def of(cls, num_rows: int, device: torch.device) -> "RowSteps":
        """A few blocks at a time on a CPU, all rows at once on a GPU."""
        step = _CPU_ROWS if device.type == "cpu" else max(num_rows, 1)
        firsts = range(0, max(num_rows, 1), step)
        return cls(tuple(slice(row, min(row + step, num_rows)) for row in firsts))

    @classmethod
    def in_turns(cls, num_rows: int, device: torch.device) -> "RowSteps":
        """For `map_in_turns`: a few parts, of whole blocks, where a GPU has many rows."""
        turns = min(_TURNS, num_rows // _LEAST_ROWS_OF_A_TURN)
        if device.type == "cpu" or turns < 2:
            return cls.of(num_rows, device)
        step = -(-num_rows // (turns * _BLOCK)) * _BLOCK
        return cls(tuple(slice(row, min(row + step, num_rows)) for row in range(0, num_rows, step)))

    def map(self, function: Callable[[slice], tuple[T, ...]]) -> list[T]:
        """Call a function that computes some rows, step by step, and join its results."""
        return _all_joined([function(rows) for rows in self.slices])

    def map_in_turns(
        self, function: Callable[[slice], Generator[None, None, tuple[T, ...]]]
    ) -> list[T]:
        """As `map`, but where one step yields, because it waits for others, the next goes on.

        All yield as often as each other.
        """
        under_way = [function(rows) for rows in self.slices]
        parts: list[tuple[T, ...]] = []
        while not parts:
            for each in under_way:
                try:
                    next(each)
                except StopIteration as ended:
                    parts.append(ended.value)
        return _all_joined(parts)


def finished(work: Generator[None, None, Result]) -> Result:
    """Run what may be done in turns from its beginning to its end."""
    while True:
        try:
            next(work)
        except StopIteration as ended:
            return ended.value


def _all_joined(parts: Sequence[tuple[T, ...]]) -> list[T]:
    if len(parts) == 1:
        return list(parts[0])
    joined: dict[int, T] = {}  # Results that are one object stay one.
    for results in zip(*parts, strict=True):
        if id(results[0]) not in joined:
            joined[id(results[0])] = _joined(results)
    return [joined[id(result)] for result in parts[0]]


def _joined(parts: Sequence[T]) -> T:
    """Rows of the same kind, one after the other."""
    if isinstance(parts[0], NarrowRows):
        return cast(T, NarrowRows.joined(cast(Sequence[NarrowRows], parts)))
    return cast(T, torch.cat(cast(list[Tensor], list(parts))))


ALL_ROWS = RowSteps((slice(None),))
