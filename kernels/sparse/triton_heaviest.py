# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""The heaviest of many columns on a GPU, without sorting them.

The bits of numbers that are not negative rise as they do. Three times numbers are counted by some
of their bits, the highest first, among those that agree with the least one wanted in the bits
before: so that one is known, and how many equals of it are wanted. Then what is wanted is counted
stretch by stretch, and written where it belongs, in its order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selections import NOTHING

_STRETCH = 4096
_LEVELS = ((20, 2048), (10, 1024), (0, 1024))
"""Bits below those that are counted by, and how many values these have: 31 bits in all."""


@triton.jit
def _load_bits(weights, line, row_stride, n, STRETCH: tl.constexpr):
    """Bits of one stretch of a line; what is none, or beyond its end, is below -1."""
    place = tl.program_id(0) * STRETCH + tl.arange(0, STRETCH)
    value = tl.load(weights + line.to(tl.int64) * row_stride + place, mask=place < n, other=-1.0)
    return place, value, value.to(tl.int32, bitcast=True)


@triton.jit(do_not_specialize=["n", "row_stride"])
def _count_bits(
    weights, row_stride, n, least, histogram,
    SHIFT: tl.constexpr, BINS: tl.constexpr, FIRST: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """Count a stretch's numbers that agree with `least` so far, by their next bits."""
    line = tl.program_id(1)
    _, _, bits = _load_bits(weights, line, row_stride, n, STRETCH)  # pyright: ignore
    value = bits >> SHIFT
    counted = bits >= 0
    if not FIRST:
        counted = counted & (value // BINS == tl.load(least + line))
        value = value % BINS
    found = tl.histogram(tl.where(counted, value, 0), BINS, mask=counted)
    bins = tl.arange(0, BINS)
    tl.atomic_add(histogram + line * 2048 + bins, found, mask=found > 0)


@triton.jit
def _find_bits(histogram, least, wanted, BINS: tl.constexpr, FIRST: tl.constexpr):
    """Add to the bits of the least number wanted those that were counted by.

    `wanted` becomes how many are wanted of those that agree with it. Where there are fewer than
    wanted, `least` is -1: all are.
    """
    line = tl.program_id(0)
    bins = tl.arange(0, BINS)
    found = tl.load(histogram + line * 2048 + bins)
    count = tl.load(wanted + line)
    before = tl.load(least + line)
    # How many are in this bin or in a higher one.
    reaching = tl.sum(found, 0) - tl.cumsum(found, 0) + found
    last = tl.sum((reaching >= count).to(tl.int32), 0) - 1
    bits = last
    if not FIRST:
        bits = before * BINS + last
        bits = tl.where(before < 0, -1, bits)
    higher = tl.sum(tl.where(bins > last, found, 0), 0)
    tl.store(least + line, bits)
    tl.store(wanted + line, tl.where(bits < 0, 0, count - higher))


@triton.jit(do_not_specialize=["n", "row_stride"])
def _count_wanted(weights, row_stride, n, least, counts, STRETCH: tl.constexpr):
    """How many of a stretch's numbers are greater than the least one wanted, and how many equal."""
    line = tl.program_id(1)
    _, _, bits = _load_bits(weights, line, row_stride, n, STRETCH)  # pyright: ignore
    limit = tl.load(least + line)
    target = counts + (line * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(target, tl.sum((bits > limit).to(tl.int32), 0))
    tl.store(target + 1, tl.sum((bits == limit).to(tl.int32), 0))


@triton.jit(do_not_specialize=["n", "row_stride", "place_stride", "first_place", "most"])
def _write_wanted(
    weights, row_stride, n, places, place_stride, first_place, least, wanted, counts,
    out_weights, out_places, most,
    PLACES: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    line, stretch = tl.program_id(1), tl.program_id(0)
    place, value, bits = _load_bits(weights, line, row_stride, n, STRETCH)  # pyright: ignore
    limit, equals = tl.load(least + line), tl.load(wanted + line)
    # Those of the stretches before.
    above, same = 0, 0
    for first in range(0, stretch, 256):
        other = first + tl.arange(0, 256)
        source = counts + (line * tl.num_programs(0) + other) * 2
        above += tl.sum(tl.load(source, mask=other < stretch, other=0), 0)
        same += tl.sum(tl.load(source + 1, mask=other < stretch, other=0), 0)
    is_above, is_same = (bits > limit).to(tl.int32), (bits == limit).to(tl.int32)
    higher = above + tl.cumsum(is_above, 0) - is_above
    like = same + tl.cumsum(is_same, 0) - is_same
    chosen = (is_above != 0) | ((is_same != 0) & (like < equals))
    where = place + first_place
    if PLACES:
        source = places + line.to(tl.int64) * place_stride + place
        where = tl.load(source, mask=chosen, other=0)
    target = line.to(tl.int64) * most + higher + tl.minimum(like, equals)
    tl.store(out_weights + target, value, mask=chosen)
    tl.store(out_places + target, where, mask=chosen)


def heaviest(
    weights: Tensor, places: Tensor | int, counts: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """As the package's `heaviest`, for tensors on one GPU.

    Args:
        counts: integers [lines], of which `most` is the greatest.

    Returns:
        weights and places, each [lines, most].
    """
    (lines, n), device = weights.shape, weights.device
    if weights.stride(1) != 1:
        weights = weights.contiguous()
    out_weights = torch.full((lines, most), -1.0, dtype=torch.float32, device=device)
    out_places = torch.full((lines, most), NOTHING, dtype=torch.int32, device=device)
    stretches = -(-n // _STRETCH)
    if stretches == 0 or most == 0:
        return out_weights, out_places
    wanted = counts.to(torch.int32, copy=True)
    # Histograms of all levels, and the least number wanted.
    zeros = torch.zeros(lines * (len(_LEVELS) * 2048 + 1), dtype=torch.int32, device=device)
    least, histograms = zeros[:lines], zeros[lines:].view(len(_LEVELS), -1)
    numbers, grid = (weights, weights.stride(0), n), (stretches, lines)
    for level, (shift, bins) in enumerate(_LEVELS):
        histogram = histograms[level]
        _count_bits[grid](
            *numbers, least, histogram,
            SHIFT=shift, BINS=bins, FIRST=level == 0, STRETCH=_STRETCH, num_warps=8,
        )  # fmt: skip
        _find_bits[(lines,)](histogram, least, wanted, BINS=bins, FIRST=level == 0, num_warps=4)
    parts = torch.empty(lines, stretches, 2, dtype=torch.int32, device=device)
    _count_wanted[grid](*numbers, least, parts, STRETCH=_STRETCH, num_warps=8)
    by_table = isinstance(places, Tensor)
    _write_wanted[grid](
        *numbers, places if by_table else least, places.stride(0) if by_table else 0,
        0 if by_table else places, least, wanted, parts, out_weights, out_places, most,
        PLACES=by_table, STRETCH=_STRETCH, num_warps=8,
    )  # fmt: skip
    return out_weights, out_places
