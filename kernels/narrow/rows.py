"""Rows of activations that are kept as e4m3, and how they became so."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Columns, or rows and columns of weights, that share a scale where scales are by blocks."""
LARGEST = 448.0
"""Of e4m3."""
LEAST_SCALE = 2.0**-64
"""So that a row of zeros has a scale, and its reciprocal is finite."""


@dataclass(frozen=True)
class Narrowing:
    """Which numbers of a row share a scale: `group` neighbours, or all where that is None."""

    group: int | None = None

    def groups(self, columns: int) -> int:
        """Scales of a row.

        Raises:
            ValueError: the columns are no whole groups.
        """
        if self.group is None:
            return 1
        if columns % self.group:
            raise ValueError(f"{columns} columns are no whole groups of {self.group}")
        return columns // self.group


BY_ROW = Narrowing()


@dataclass(frozen=True, eq=False)
class NarrowRows:
    """Rows [n, columns], of which a number is its e4m3 value times its group's scale.

    `dtype` is what they were narrowed from, and what products of them come in.
    """

    values: Tensor  # float8_e4m3fn [n, columns]
    scales: Tensor  # float32 [n, groups]
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, rows: slice | Tensor) -> "NarrowRows":
        """Some rows: views of a slice, copies of those that int64 [n] names."""
        # Not every device picks e4m3: bits are.
        bits = self.values.view(torch.uint8)[rows]
        return NarrowRows(bits.view(torch.float8_e4m3fn), self.scales[rows], self.dtype)

    def wide(self) -> Tensor:
        """The numbers, float32 [n, columns]."""
        count, columns = self.values.shape
        groups = self.scales.shape[1]
        grouped = self.values.float().view(count, groups, columns // groups)
        return (grouped * self.scales[..., None]).view(count, columns)

    @classmethod
    def joined(cls, parts: "Sequence[NarrowRows]") -> "NarrowRows":
        """One after the other."""
        # Not every device joins e4m3: bits are.
        bits = torch.cat([part.values.view(torch.uint8) for part in parts])
        scales = torch.cat([part.scales for part in parts])
        return cls(bits.view(torch.float8_e4m3fn), scales, parts[0].dtype)


Rows = Tensor | NarrowRows
"""Rows of activations as a product takes them: in the type they are computed in, or of 8 bits."""


def rows_at(rows: Rows, index: Tensor) -> Rows:
    """Copies of some rows, in the order of `index`, int64 [m]."""
    if isinstance(rows, Tensor):
        return rows[index]
    values = rows.values.view(torch.uint8)[index].view(rows.values.dtype)
    return NarrowRows(values, rows.scales[index], rows.dtype)
