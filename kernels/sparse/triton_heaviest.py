# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""The heaviest of many columns on a GPU, without sorting them.

The bits of numbers that are not negative rise as they do. The least one wanted is searched for by
its bits, four at a time: a pass counts how many numbers reach each of 15 limits, of which the
highest that enough reach is kept. Then what is wanted is counted stretch by stretch, and written
where it belongs, in its order. (Counting by tables of bits takes five times as long: sums of
attention are so alike that all threads count in the same places.)
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .selections import NOTHING

_STRETCH = 4096
_LIMITS = 16
_SHIFTS = (27, 23, 19, 15, 11, 7, 3, 0)
"""Of the four bits that a pass finds; of the last one's, three are new."""


@triton.jit
def _load_bits(weights, line, row_stride, part_stride, width, first, n, STRETCH: tl.constexpr):
    """Bits of some numbers of a line, which lies in parts; what is none is below 0."""
    place = first + tl.arange(0, STRETCH)
    source = weights + line.to(tl.int64) * row_stride
    source += (place // width).to(tl.int64) * part_stride + place % width
    value = tl.load(source, mask=place < n, other=-1.0)
    return place, value, value.to(tl.int32, bitcast=True)


@triton.jit
def _least_so_far(counts, line, lines, wanted, pass_number, SHIFTS: tl.constexpr):
    """The least number wanted, as far as the passes before have found its bits."""
    limit = tl.arange(0, 16)
    least = 0
    count = tl.load(wanted + line)
    for before in tl.static_range(len(SHIFTS)):
        if before < pass_number:
            reach = tl.load(counts + (before * lines + line) * 16 + limit)
            enough = (reach >= count) & (limit > 0)
            least += tl.max(tl.where(enough, limit, 0), 0) << SHIFTS[before]
    return tl.where(count > 0, least, 2147483647)


@triton.jit(do_not_specialize=["n", "width", "row_stride", "part_stride", "pass_number"])
def _count_reaching(
    weights, row_stride, part_stride, width, n, wanted, counts, pass_number, shift,
    SHIFTS: tl.constexpr, STRETCH: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Count the numbers of a stretch that reach each of 15 limits."""
    line, lines = tl.program_id(1), tl.num_programs(1)
    least = _least_so_far(counts, line, lines, wanted, pass_number, SHIFTS)
    limit = tl.arange(0, 16)
    found = tl.zeros([STEP, 16], tl.int32)
    first = tl.program_id(0) * STRETCH
    for start in range(first, tl.minimum(first + STRETCH, n), STEP):
        _, _, bits = _load_bits(weights, line, row_stride, part_stride, width, start, n, STEP)
        # As a difference: the highest limits would not fit.
        apart = tl.where(bits >= least, (bits - least) >> shift, -1)
        found += (apart[:, None] >= limit[None, :]).to(tl.int32)
    reaching = tl.sum(found, 0)
    target = counts + (pass_number * lines + line) * 16 + limit
    tl.atomic_add(target, reaching, mask=reaching > 0)


@triton.jit(do_not_specialize=["n", "width", "row_stride", "part_stride"])
def _count_wanted(
    weights, row_stride, part_stride, width, n, wanted, counts, parts,
    SHIFTS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    """How many of a stretch's numbers are greater than the least one wanted, and how many equal."""
    line, lines = tl.program_id(1), tl.num_programs(1)
    least = _least_so_far(counts, line, lines, wanted, len(SHIFTS), SHIFTS)
    first = tl.program_id(0) * STRETCH
    _, _, bits = _load_bits(weights, line, row_stride, part_stride, width, first, n, STRETCH)
    target = parts + (line * tl.num_programs(0) + tl.program_id(0)) * 2
    tl.store(target, tl.sum((bits > least).to(tl.int32), 0))
    tl.store(target + 1, tl.sum((bits == least).to(tl.int32), 0))


@triton.jit(do_not_specialize=["n", "width", "row_stride", "part_stride", "first_place", "most"])
def _write_wanted(
    weights, row_stride, part_stride, width, n, wanted, counts, parts, places, first_place,
    out_weights, out_places, most,
    PLACES: tl.constexpr, SHIFTS: tl.constexpr, STRETCH: tl.constexpr,
):  # fmt: skip
    line, lines, stretch = tl.program_id(1), tl.num_programs(1), tl.program_id(0)
    least = _least_so_far(counts, line, lines, wanted, len(SHIFTS), SHIFTS)
    place, value, bits = _load_bits(
        weights, line, row_stride, part_stride, width, stretch * STRETCH, n, STRETCH
    )
    # Those of the stretches before; and of all, what are greater.
    above, same, greater = 0, 0, 0
    for first in range(0, tl.num_programs(0), 256):
        other = first + tl.arange(0, 256)
        source = parts + (line * tl.num_programs(0) + other) * 2
        more = tl.load(source, mask=other < tl.num_programs(0), other=0)
        greater += tl.sum(more, 0)
        above += tl.sum(tl.where(other < stretch, more, 0), 0)
        same += tl.sum(tl.load(source + 1, mask=other < stretch, other=0), 0)
    equals = tl.load(wanted + line) - greater
    is_above, is_same = (bits > least).to(tl.int32), (bits == least).to(tl.int32)
    higher = above + tl.cumsum(is_above, 0) - is_above
    like = same + tl.cumsum(is_same, 0) - is_same
    chosen = (is_above != 0) | ((is_same != 0) & (like < equals))
    where = place + first_place
    if PLACES:
        source = places + line.to(tl.int64) * row_stride
        source += (place // width).to(tl.int64) * part_stride + place % width
        where = tl.load(source, mask=chosen, other=0)
    target = line.to(tl.int64) * most + higher + tl.minimum(like, equals)
    tl.store(out_weights + target, value, mask=chosen)
    tl.store(out_places + target, where, mask=chosen)


def heaviest(
    weights: Tensor, places: Tensor | int, counts: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """As the package's `heaviest`, for tensors on one GPU.

    Args:
        weights: [lines, n], or in parts that follow one another, [parts, lines, n].
        places: as weights, and with their strides.
        counts: int32 [lines], of which `most` is the greatest.

    Returns:
        weights and places, each [lines, most].
    """
    by_table = isinstance(places, Tensor)
    if weights.dim() == 2:
        weights, places = weights[None], places[None] if by_table else places
    (num_parts, lines, width), device = weights.shape, weights.device
    if weights.stride(2) != 1 or (by_table and places.stride() != weights.stride()):
        raise ValueError("weights and places must lie alike, with neighbours side by side")
    out_weights = torch.full((lines, most), -1.0, dtype=torch.float32, device=device)
    out_places = torch.full((lines, most), NOTHING, dtype=torch.int32, device=device)
    n = num_parts * width
    if n == 0 or most == 0:
        return out_weights, out_places
    reaching = torch.zeros(len(_SHIFTS) * lines * _LIMITS, dtype=torch.int32, device=device)
    numbers = (weights, weights.stride(1), weights.stride(0), width, n, counts, reaching)
    long = 4 * _STRETCH
    for number, shift in enumerate(_SHIFTS):
        _count_reaching[(triton.cdiv(n, long), lines)](
            *numbers, number, shift, SHIFTS=_SHIFTS, STRETCH=long, STEP=512, num_warps=4
        )
    stretches = triton.cdiv(n, _STRETCH)
    parts = torch.empty(lines, stretches, 2, dtype=torch.int32, device=device)
    _count_wanted[(stretches, lines)](
        *numbers, parts, SHIFTS=_SHIFTS, STRETCH=_STRETCH, num_warps=8
    )
    _write_wanted[(stretches, lines)](
        *numbers, parts, places if by_table else reaching, 0 if by_table else places,
        out_weights, out_places, most,
        PLACES=by_table, SHIFTS=_SHIFTS, STRETCH=_STRETCH, num_warps=8,
    )  # fmt: skip
    return out_weights, out_places
