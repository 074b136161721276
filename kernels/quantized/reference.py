"""The definitions, in PyTorch; arguments and results are those of the package's functions."""

import torch
from torch import Tensor

from ..dual_chunk.segments import Rotation
from ..page_size import PAGE_TOKENS
from ..pages import to_pages

LARGEST = 448.0
"""Of e4m3."""


def scale_for(largest: Tensor) -> Tensor:
    """The least power of two, from 2^-126 on, that brings float32 `largest` to 448 or less."""
    bits = largest.contiguous().view(torch.int32)
    # 448 is 1.75 * 2^8.
    exponent = (bits >> 23) - 8 + ((bits & 0x7FFFFF) > 0x600000).int()
    return (exponent.clamp(min=1) << 23).view(torch.float32)


def narrow_pages(
    memory: Tensor, scales: Tensor, pages: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """Whole pages, each with a scale of its own."""
    wide = to_pages(rotation.apply(k.float()), v.float())
    own = scale_for(wide.abs().amax((-2, -1)))
    scales[pages] = own
    _put(memory, pages, wide / own[..., None, None])


def narrow_blocks(
    memory: Tensor, scales: Tensor, blocks: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """Each block's rows as pages of their own."""
    for page, first, count in blocks.tolist():
        if count:
            rows = slice(first, first + count)
            own = Rotation(rotation.cosine[rows], rotation.sine[rows])
            pages = torch.tensor([page], device=k.device)
            narrow_pages(memory, scales, pages, k[rows], v[rows], own)


def append_tokens(
    memory: Tensor, scales: Tensor, slots: Tensor, k: Tensor, v: Tensor, rotation: Rotation
) -> None:
    """One row of each page; the rows before it are scaled anew where they have to be."""
    written = slots >= 0
    pages, offsets = slots[written] // PAGE_TOKENS, slots[written] % PAGE_TOKENS
    tokens = torch.stack((rotation.apply(k.float()), v.float()), 2)[written]  # [n, kv_heads, 2, d]
    needed = scale_for(tokens.abs().amax(-1))
    begins = (offsets == 0)[:, None, None]
    before = torch.where(begins, needed, scales[pages])
    after = torch.maximum(before, needed)
    row = torch.arange(PAGE_TOKENS, device=slots.device)[None, None, None, :, None]
    offset = offsets[:, None, None, None, None]
    values = _get(memory, pages)
    held = torch.where(row < offset, values * (before / after)[..., None, None], values)
    fresh = tokens / after[..., None]
    scales[pages] = after
    _put(memory, pages, torch.where(row == offset, fresh[:, :, :, None], held))


def widen_pages(memory: Tensor, scales: Tensor, table: Tensor, out: Tensor) -> None:
    """Values times scales."""
    pages = table.long()
    out.copy_(_get(memory, pages) * scales[pages][..., None, None])


def _get(memory: Tensor, pages: Tensor) -> Tensor:
    """In float32. PyTorch's index functions do not take e4m3 everywhere, so bytes are moved."""
    return memory.view(torch.uint8)[pages].view(memory.dtype).float()


def _put(memory: Tensor, pages: Tensor, values: Tensor) -> None:
    """Round to e4m3."""
    rounded = values.clamp(-LARGEST, LARGEST).to(memory.dtype)
    memory.view(torch.uint8)[pages] = rounded.view(torch.uint8)
