"""Attention over some keys and attention over others, put together by their log-sum-exps."""

import torch
from torch import Tensor


def merge_attention(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Take attention of the same queries over more keys into a softmax, in place.

    Args:
        output: float32 [..., d], may be a view; 0 before any key.
        lse: natural log-sum-exps, float32 [...]; -inf before any key.
        part: attention over the other keys, which has some, as `output`, of any floating type.
        part_lse: theirs, as `lse`.
    """
    total = torch.logaddexp(lse, part_lse)
    kept, added = ((each - total).exp()[..., None] for each in (lse, part_lse))
    output.mul_(kept).add_(part.float() * added)
    lse.copy_(total)
