"""Drawing the next token of every row of logits, where the logits are.

What is drawn is defined for one row on the host, in `reference`; the kernels draw the same, up to
the rounding of single weights. See docs/decode.md.
"""

from torch import Tensor

from . import reference
from .rows import MASKED, PENALIZED, Adjustments, RowInputs

__all__ = ["MASKED", "PENALIZED", "Adjustments", "RowInputs", "sample"]


def sample(logits: Tensor, rows: RowInputs, adjustments: Adjustments) -> tuple[Tensor, Tensor]:
    """A token for each row of logits [n, vocab], of any floating type.

    Args:
        rows: what each row asks for.
        adjustments: of n rows or more; those of rows that ask for them are brought up to date.

    Returns:
        tokens int32 [n], and the natural logarithm of their probability before anything was
        adjusted, float32 [n]. It is not finite, and the token means nothing, where a row holds NaN
        or infinity, or nothing but -infinity.
    """
    if logits.is_cuda:
        from . import triton_sampling

        return triton_sampling.sample(logits, rows, adjustments)
    return reference.sample(logits, rows, adjustments)
