"""The heaviest of many columns, as many as each line wants, in the order of their places.

Of equals any may be taken.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .selections import NOTHING


@dataclass(frozen=True, eq=False)
class ColumnCandidates:
    """Some columns of each line and their weights, each [lines, most].

    `places`, int32, are token positions, which rise unless it is said; `weights` are float32. Lines
    that have less are filled up with `NOTHING` and -1, at their end; what is joined, anywhere.
    """

    weights: Tensor
    places: Tensor

    def filled_up(self, most: int) -> "ColumnCandidates":
        """With `most` of each line."""
        missing = (0, most - self.weights.shape[1])
        pad = torch.nn.functional.pad
        return ColumnCandidates(
            pad(self.weights, missing, value=-1.0), pad(self.places, missing, value=NOTHING)
        )


def heaviest_in_no_order(columns: Tensor, first_key: int, most: int) -> ColumnCandidates:
    """The `most` heaviest of each line of keys [first_key, first_key + n), in any order.

    Args:
        columns: float32 [lines, n].
    """
    values, order = columns.topk(min(most, columns.shape[1]), sorted=False)
    return ColumnCandidates(values, (order + first_key).to(torch.int32)).filled_up(most)


def heaviest(weights: Tensor, places: Tensor | int, counts: Sequence[int]) -> ColumnCandidates:
    """The `counts[line]` heaviest of each line, or all where it has less.

    Args:
        weights: float32 [lines, n], or in parts, [parts, lines, n]. Not negative, or -1 for none.
        places: theirs, int32; or that of the first, where they are neighbours.
    """
    if weights.dim() == 3:
        weights = weights.transpose(0, 1).flatten(1)
        places = places if isinstance(places, int) else places.transpose(0, 1).flatten(1)
    most = min(max(counts), weights.shape[1])
    values, order = weights.topk(most)
    rank = torch.arange(most, device=weights.device)
    left_out = rank >= on_device(tuple(counts), weights.device)[:, None]
    left_out |= values < 0
    where = order + places if isinstance(places, int) else places.gather(1, order)
    where, order = where.masked_fill_(left_out, NOTHING).sort(1)
    values = values.masked_fill_(left_out, -1.0).gather(1, order)
    return ColumnCandidates(values, where.to(torch.int32)).filled_up(max(counts))


@lru_cache(maxsize=1024)
def on_device(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """Kept, so that a layer copies its budgets to the device once."""
    return torch.tensor(counts, dtype=torch.int32, device=device)
