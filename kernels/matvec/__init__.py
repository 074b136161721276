"""A linear layer for one row: a matrix times a vector, at the memory's speed."""

from torch import Tensor

from . import reference

__all__ = ["linear"]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [1, columns] times weight [rows, columns] transposed, plus bias [rows]: [1, rows].

    Sums are in float32, the bias included, and rounded once to x's type.
    """
    if x.is_cuda:
        from . import triton_matvec

        return triton_matvec.linear(x, weight, bias)
    return reference.linear(x, weight, bias)
