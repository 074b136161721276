"""How many rows of hidden states are computed at once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar, cast

import torch
from torch import Tensor

from ...kernels.narrow import NarrowRows, Rows

T = TypeVar("T", bound=Rows)

_CPU_ROWS = 2048
"""Whole blocks of 128. What a whole chunk leaves in between would outgrow a CPU's caches."""


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

    def map(self, function: Callable[[slice], tuple[T, ...]]) -> list[T]:
        """Call a function that computes some rows, step by step, and join its results."""
        parts = [function(rows) for rows in self.slices]
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
