"""How one decode step's attention is divided among programs, made once for all layers.

A program is one thread block of one KV head. All pages of all sequences, one sequence after the
other, are cut into as many stretches of equal cost as there are programs; a stretch that
reaches over a sequence's end falls into one item a sequence. So a million tokens beside a few
thousand occupy every multiprocessor until the end.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from ..page_size import PAGE_TOKENS

_ITEM_COST = 1
"""Pages that could be read while an item starts: its bounds, its first page number, its first
page, each of which waits for the one before."""

_Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class DecodePlan:
    """Views of one int32 tensor on the device, whose addresses stay: a CUDA graph may read them.

    Program p of every KV head takes the items [program_items[p], program_items[p + 1]); those of
    sequence s, and so its partial results, are [sequence_items[s], sequence_items[s + 1]).
    """

    storage: Tensor
    lengths: Tensor  # [batch]: tokens of each sequence, 0 for a row that is not used
    sequence_items: Tensor  # [batch + 1]
    program_items: Tensor  # [programs + 1]
    items: Tensor  # [batch + programs, 3]: sequence, first page, page after the last

    @classmethod
    def allocate(cls, batch: int, programs: int, device: torch.device) -> "DecodePlan":
        """A plan of empty sequences.

        Args:
            batch: rows of the step, unused ones included.
            programs: of each KV head; best a multiple of what runs at the same time.
        """
        storage = torch.zeros(cls.size(batch, programs), dtype=torch.int32, device=device)
        return cls.over(storage, batch, programs)

    @staticmethod
    def size(batch: int, programs: int) -> int:
        """Numbers in the storage of such a plan."""
        return sum(_sizes(batch, programs))

    @classmethod
    def over(cls, storage: Tensor, batch: int, programs: int) -> "DecodePlan":
        """A plan in a tensor that is there: int32 [size], which says what the plan is."""
        lengths, sequence_items, program_items, items = storage.split(_sizes(batch, programs))
        return cls(storage, lengths, sequence_items, program_items, items.view(-1, 3))

    @property
    def batch(self) -> int:
        """Rows of the step."""
        return len(self.lengths)

    @property
    def programs(self) -> int:
        """Programs of each KV head."""
        return len(self.program_items) - 1

    def refresh(self, lengths: Sequence[int]) -> None:
        """Plan the next step, in place; does not wait for the device.

        Args:
            lengths: tokens of the first rows, each sequence's newest included; 0 for none. Rows
                beyond are empty.
        """
        if len(lengths) > self.batch:
            raise ValueError(f"{len(lengths)} sequences do not fit in a plan for {self.batch}")
        padded = np.zeros(self.batch, dtype=np.int64)
        padded[: len(lengths)] = lengths
        plan = np.zeros(len(self.storage), dtype=np.int32)
        parts = (padded, *_divide(-(-padded // PAGE_TOKENS), self.programs))
        written = np.concatenate([part.ravel() for part in parts])
        plan[: len(written)] = written
        self.storage.copy_(torch.from_numpy(plan), non_blocking=True)


def _sizes(batch: int, programs: int) -> list[int]:
    """Of a plan's parts, in their order."""
    return [batch, batch + 1, programs + 1, (batch + programs) * 3]


def _divide(pages: _Integers, programs: int) -> tuple[_Integers, _Integers, _Integers]:
    """Sequence items, program items and items, for sequences of so many pages each."""
    page_ends = pages.cumsum()
    page_starts = page_ends - pages
    costs = np.where(pages > 0, pages + _ITEM_COST, 0)
    cost_ends = costs.cumsum()
    cuts = cost_ends[-1] * np.arange(programs + 1) // programs
    cut_sequences = np.minimum(np.searchsorted(cost_ends, cuts, side="right"), len(pages) - 1)
    into = cuts - (cost_ends - costs)[cut_sequences] - _ITEM_COST
    # Pages counted through all sequences, as are the items' borders.
    page_cuts = page_starts[cut_sequences] + np.clip(into, 0, pages[cut_sequences])
    borders = np.unique(np.concatenate((page_cuts, page_starts, page_ends[-1:])))
    first = borders[:-1]
    sequences = np.searchsorted(page_ends, first, side="right")
    origins = page_starts[sequences]
    items = np.stack((sequences, first - origins, borders[1:] - origins), axis=1)
    sequence_items = np.searchsorted(borders, np.concatenate((page_starts, page_ends[-1:])))
    return sequence_items, np.searchsorted(borders, page_cuts), items
