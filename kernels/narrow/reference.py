"""The definitions, in PyTorch; arguments and results are those of the package's functions."""

import torch
import torch.nn.functional as functional
from torch import Tensor

from .rows import BLOCK, LARGEST, LEAST_SCALE, Narrowing, NarrowRows


def narrow_rows(x: Tensor, narrowing: Narrowing) -> NarrowRows:
    """The largest number of each group becomes 448."""
    count, columns = x.shape
    groups = narrowing.groups(columns)
    grouped = x.float().reshape(count, groups, columns // groups)
    scales = (grouped.abs().amax(-1) / LARGEST).clamp(min=LEAST_SCALE)
    # Products with reciprocals, as the kernels have them: both versions round alike.
    values = grouped * (1.0 / scales)[..., None]
    return NarrowRows(values.view(count, columns).to(torch.float8_e4m3fn), scales, x.dtype)


def linear(x: NarrowRows, weight: Tensor, scales: Tensor, bias: Tensor | None = None) -> Tensor:
    """Of widened numbers, in float32."""
    wide_bias = None if bias is None else bias.float()
    return functional.linear(x.wide(), widened(weight, scales), wide_bias).to(x.dtype)


def widened(weight: Tensor, scales: Tensor) -> Tensor:
    """The matrix that weights of 8 bits stand for, float32 [outputs, inputs]."""
    if scales.dim() == 1:
        return weight.float() * scales[:, None]
    outputs, inputs = weight.shape
    every = scales.repeat_interleave(BLOCK, 0)[:outputs].repeat_interleave(BLOCK, 1)[:, :inputs]
    return weight.float() * every
