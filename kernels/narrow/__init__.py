"""Matrices of 8 bits: e4m3 numbers with float32 scales, and products of them (arXiv 2209.05433).

A number is its scale times an e4m3 value. Weights have a scale for each output, or for each block
of 128 outputs and 128 inputs; rows of activations have one each, or one for each 128 columns. So
a product of two has its scales outside the sum, or outside of each 128 terms of it.

Unlike those of KV pages, scales are no powers of two: nothing is scaled anew later, and a row uses
e4m3's range whole. On GPUs each function is one kernel; elsewhere it is its definition.
"""

from torch import Tensor

from . import reference
from .rows import BLOCK, BY_ROW, Narrowing, NarrowRows, Rows, rows_at

__all__ = ["BLOCK", "BY_ROW", "NarrowRows", "Narrowing", "Rows", "linear", "narrow_rows", "rows_at"]


def narrow_rows(x: Tensor, narrowing: Narrowing = BY_ROW) -> NarrowRows:
    """Round x [n, columns] to e4m3; its rows may lie apart."""
    return _version(x).narrow_rows(x, narrowing)


def linear(x: NarrowRows, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [n, inputs] times weight transposed, plus bias: [n, outputs], in x's `dtype`.

    Sums are in float32, and rounded once.

    Args:
        weight: float8_e4m3fn [outputs, inputs].
        scales: float32 [outputs] for x of one scale a row; [outputs / 128, inputs / 128], rounded
            up, for x of a scale for each 128 columns.
        bias: [outputs] in the result's type.
    """
    return _version(x.values).linear(x, weight, scales, bias)


def _version(tensor: Tensor):
    """The module that serves this tensor's device; only GPUs need Triton installed."""
    if tensor.is_cuda:
        from . import triton_narrow

        return triton_narrow
    return reference
