"""A linear layer's weights in the format that they are kept in, and their product with rows.

Whatever depends on how weights are kept, or on how few rows are multiplied, is here: the layer and
the head only call.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch.nn.functional as functional
from torch import Tensor

from ...kernels import matvec

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""x [n, inputs], weight [outputs, inputs] and bias [outputs] or None to [n, outputs]."""


@dataclass(frozen=True, eq=False)
class Linear:
    """x [n, inputs] to x times `weight` transposed, plus `bias`: [n, outputs] in x's type.

    `weight` is [outputs, inputs] in x's type; or of 8 bits, and then float32 `scale` [outputs]
    multiplies its rows. `product` computes it: by default for any number of rows.
    """

    weight: Tensor
    scale: Tensor | None = None
    bias: Tensor | None = None
    product: Product = functional.linear

    def __call__(self, x: Tensor) -> Tensor:
        """[n, inputs] to [n, outputs]."""
        return self.product(x, self._weight_as(x), self.bias)

    def rows(self, rows: slice) -> "Linear":
        """Views of some outputs' weights."""
        scale = None if self.scale is None else self.scale[rows]
        bias = None if self.bias is None else self.bias[rows]
        return replace(self, weight=self.weight[rows], scale=scale, bias=bias)

    def for_one_row(self) -> "Linear":
        """The same weights, not copied, multiplied with x of one row [1, inputs] only.

        Libraries' products are made for many rows; on a GPU one row goes faster by a kernel of its
        own, whose sums are rounded differently.
        """
        return replace(self, product=matvec.linear)

    def _weight_as(self, x: Tensor) -> Tensor:
        if self.scale is None:
            return self.weight
        return (self.weight.float() * self.scale[:, None]).to(x.dtype)
