"""A chunk's last queries against some of the keys before them: the steps that ranks share.

Ranks deal the keys to one another. Each scores its part twice: first it says the log-sum-exps of
its scores, in stretches; with those of all parts, in order, it then sums attention over its keys.
One process has one part, of all keys.
"""

import itertools
import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from .selections import Sums


@dataclass(frozen=True)
class KeyPart:
    """Part `number` of `parts`, which are as even as can be; small ones may be empty."""

    number: int = 0
    parts: int = 1

    def of(self, count: int) -> slice:
        """This part of so many."""
        return slice(count * self.number // self.parts, count * (self.number + 1) // self.parts)

    def counts(self, count: int) -> list[int]:
        """How many of so many each part has."""
        borders = [count * each // self.parts for each in range(self.parts + 1)]
        return [end - start for start, end in itertools.pairwise(borders)]


ALL_KEYS = KeyPart()


@dataclass(frozen=True, eq=False)
class PartSums:
    """Sums over the keys of one part; those of `Sums` are the parts' together.

    `columns` and `heavy_columns` are float32 [heads, keys of the part]. `bands`, float32 [heads,
    all bands], and `diagonals`, [heads, all keys], are what this part gives to each: add them up.
    """

    columns: Tensor
    bands: Tensor
    heavy_columns: Tensor | None = None
    diagonals: Tensor | None = None


class KeyScores(ABC):
    """The last rows of a chunk, scored against the keys of one part."""

    @property
    @abstractmethod
    def first_key(self) -> int:
        """Where the part begins."""

    @property
    @abstractmethod
    def num_keys(self) -> int:
        """How many keys it has."""

    @abstractmethod
    def counts(self) -> list[int]:
        """How many stretches each part has, in the order of the parts."""

    @abstractmethod
    def log_sum_exps(self) -> Tensor:
        """Of each of this part's stretches, to the base 2: float32 [heads, stretches, rows].

        Rows may be more than those that are scored, and are -inf then.
        """

    @abstractmethod
    def sums(
        self,
        every: Tensor,
        heavy: float = math.inf,
        diagonals: bool = False,
        bands: bool = True,
    ) -> PartSums:
        """Sum attention over this part's keys.

        Args:
            every: log-sum-exps of the stretches of all parts, in order, contiguous.
            heavy: a column is heavy, and left out of the bands, if it sums to so much although no
                row counts for more than an eighth of it: a key that only its own slash's row looks
                at is none.
            diagonals: whether single diagonals are wanted too.
            bands: whether bands are; else theirs may all be 0.
        """

    def all_sums(self, heavy: float = math.inf, diagonals: bool = False) -> Sums:
        """Sums over all keys, of the only part that there is; arguments as those of `sums`."""
        lse = self.log_sum_exps()
        found = self.sums(lse, heavy, diagonals)
        return Sums(found.columns, found.bands, found.heavy_columns, found.diagonals, self.num_rows)

    @property
    @abstractmethod
    def num_rows(self) -> int:
        """How many rows are scored."""


def in_order(gathered: Tensor, counts: list[int], first: int) -> Tensor:
    """Every part's stretches one after another, from what the parts sent.

    Args:
        gathered: [parts, heads, most, rows], where part p's lie at [first, first + counts[p]).
    """
    parts = [each[:, first : first + count] for each, count in zip(gathered, counts, strict=True)]
    return torch.cat(parts, 1)
