"""The definitions, in PyTorch; arguments and results are those of the package's functions."""

import torch
import torch.nn.functional as functional
from torch import Tensor

from ..dual_chunk.segments import Rotatable, Rotation, SegmentQueries
from ..narrow import Narrowing, NarrowRows
from ..narrow.reference import narrow_rows
from ..page_size import PAGE_TOKENS


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """Root mean square norm."""
    wide = x.float()
    variance = wide.square().mean(-1, keepdim=True)
    return weight * (wide * torch.rsqrt(variance + epsilon)).to(x.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float
) -> tuple[Tensor, Tensor]:
    """The sum's norm, and the sum."""
    total = residual + x
    return rms_norm(total, weight, epsilon), total


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate_up.chunk(2, dim=-1)
    return functional.silu(gate) * up


def narrow_rms_norm(x: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing) -> NarrowRows:
    """The norm, narrowed."""
    return narrow_rows(rms_norm(x, weight, epsilon), narrowing)


def narrow_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, epsilon: float, narrowing: Narrowing
) -> tuple[NarrowRows, Tensor]:
    """The sum's norm, narrowed, and the sum."""
    normed, total = add_rms_norm(x, residual, weight, epsilon)
    return narrow_rows(normed, narrowing), total


def narrow_swiglu(gate_up: Tensor, narrowing: Narrowing) -> NarrowRows:
    """silu(gate) * up, narrowed."""
    return narrow_rows(swiglu(gate_up), narrowing)


def rotate_queries(
    q: Tensor, intra: Rotation, successive: Rotation, inter: Rotation
) -> SegmentQueries:
    """Three rotations, or fewer where they are one object."""
    vectors = Rotatable(q)
    first = vectors.by(intra)
    others = (first if each is intra else vectors.by(each) for each in (successive, inter))
    return SegmentQueries(first, *others)


def write_pages(memory: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation) -> None:
    """Rotated K, and V, at the slots."""
    rotated, heads = rotation.apply(k), memory.shape[1]
    if bool((slots < 0).any()):
        written = slots >= 0
        slots, rotated, v = slots[written], rotated[written], v[written]
    # Rows of d, of which whole ones are copied: a tenth of the time of assigning by two indices.
    rows = memory.view(-1, memory.shape[-1])
    planes = (slots // PAGE_TOKENS)[:, None] * heads + torch.arange(heads, device=slots.device)
    keys = (2 * planes * PAGE_TOKENS + (slots % PAGE_TOKENS)[:, None]).flatten()
    for first, each in ((keys, rotated), (keys + PAGE_TOKENS, v)):
        rows.index_copy_(0, first, each.to(memory.dtype).reshape(-1, rows.shape[1]))
