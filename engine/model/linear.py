"""A linear layer's weights in the format that they are kept in, and their product with rows.

Whatever depends on how weights are kept, or on how few rows are multiplied, is here: the layer and
the head only call.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as functional
from torch import Tensor

from ...kernels import matvec, narrow
from ...kernels.narrow import BLOCK, BY_ROW, Narrowing, NarrowRows, Rows


class Linear(ABC):
    """x [n, inputs] to x times weights transposed, plus a bias: [n, outputs]."""

    @property
    @abstractmethod
    def takes(self) -> Narrowing | None:
        """How x is best given: narrowed so by whatever computes it; None for as it is."""

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Of weights and scales."""

    @abstractmethod
    def __call__(self, x: Rows) -> Tensor:
        """[n, inputs] to [n, outputs]."""

    @abstractmethod
    def rows(self, rows: slice) -> "Linear":
        """Views of some outputs' weights."""

    @abstractmethod
    def for_one_row(self) -> "Linear":
        """The same weights, not copied, multiplied with x of one row [1, inputs] only.

        Libraries' products are made for many rows; on a GPU one row goes faster by a kernel of its
        own, whose sums are rounded differently.
        """


@dataclass(frozen=True, eq=False)
class WideLinear(Linear):
    """Of weights in x's type."""

    weight: Tensor  # [outputs, inputs]
    bias: Tensor | None = None  # [outputs]
    product: Callable[[Tensor, Tensor, Tensor | None], Tensor] = functional.linear

    @property
    def takes(self) -> None:
        return None

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def __call__(self, x: Rows) -> Tensor:
        if isinstance(x, NarrowRows):
            raise TypeError("rows of 8 bits do not go with weights of more")
        return self.product(x, self.weight, self.bias)

    def rows(self, rows: slice) -> "WideLinear":
        return replace(self, weight=self.weight[rows], bias=_part(self.bias, rows))

    def for_one_row(self) -> "WideLinear":
        return replace(self, product=matvec.linear)


@dataclass(frozen=True, eq=False)
class NarrowLinear(Linear):
    """Of weights of 8 bits, and rows of 8 bits; see `kernels.narrow`."""

    weight: Tensor  # float8_e4m3fn [outputs, inputs]
    scales: Tensor  # float32 [outputs], or by blocks [outputs / 128, inputs / 128]
    bias: Tensor | None = None  # [outputs], in the type of what comes out

    @property
    def takes(self) -> Narrowing:
        return BY_ROW if self.scales.dim() == 1 else Narrowing(BLOCK)

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes + self.scales.nbytes

    def __call__(self, x: Rows) -> Tensor:
        rows = x if isinstance(x, NarrowRows) else narrow.narrow_rows(x, self.takes)
        return narrow.linear(rows, self.weight, self.scales, self.bias)

    def rows(self, rows: slice) -> "NarrowLinear":
        """As `Linear.rows`; where scales are by blocks, of whole ones.

        Raises:
            ValueError: a block of outputs is divided.
        """
        first, last, _ = rows.indices(len(self.weight))
        own = slice(first, last)
        if self.scales.dim() == 2:
            if first % BLOCK or (last % BLOCK and last != len(self.weight)):
                raise ValueError(f"outputs {first} to {last} are no whole blocks of {BLOCK}")
            own = slice(first // BLOCK, -(-last // BLOCK))
        bias = _part(self.bias, rows)
        return replace(self, weight=self.weight[rows], scales=self.scales[own], bias=bias)

    def for_one_row(self) -> "NarrowLinear":
        """The same: its product looks how many rows there are."""
        return self


@dataclass(frozen=True, eq=False)
class Matrix:
    """Weights [outputs, inputs] as they are kept, with scales where that is in 8 bits."""

    weight: Tensor
    scales: Tensor | None = None

    @classmethod
    def narrowed(cls, weight: Tensor) -> "Matrix":
        """Rounded to 8 bits, with a scale for each output."""
        rows = narrow.narrow_rows(weight)
        return cls(rows.values, rows.scales[:, 0].contiguous())

    @classmethod
    def joined(cls, parts: "Sequence[Matrix]") -> "Matrix":
        """One below the other; kept alike."""
        if len(parts) == 1:
            return parts[0]
        scales = [part.scales for part in parts if part.scales is not None]
        if not scales:
            return cls(torch.cat([part.weight for part in parts]))
        # Not every device joins e4m3: bits are.
        bits = torch.cat([part.weight.view(torch.uint8) for part in parts])
        return cls(bits.view(torch.float8_e4m3fn), torch.cat(scales))

    def filled_up(self, outputs: int) -> "Matrix":
        """With so many outputs, the last of which are 0."""
        missing = outputs - len(self.weight)
        if missing == 0:
            return self
        if self.scales is None:
            return Matrix(functional.pad(self.weight, (0, 0, 0, missing)))
        # Not every device fills up e4m3: bits are. The rest of a block has a scale of its own.
        bits = functional.pad(self.weight.view(torch.uint8), (0, 0, 0, missing))
        count = outputs if self.scales.dim() == 1 else -(-outputs // BLOCK)
        sides = (0, 0) * (self.scales.dim() - 1) + (0, count - len(self.scales))
        return Matrix(bits.view(torch.float8_e4m3fn), functional.pad(self.scales, sides, value=1.0))

    def linear(self, bias: Tensor | None = None) -> Linear:
        """The product with them."""
        if self.scales is None:
            return WideLinear(self.weight, bias)
        return NarrowLinear(self.weight, self.scales, bias)


def _part(bias: Tensor | None, rows: slice) -> Tensor | None:
    return None if bias is None else bias[rows]
