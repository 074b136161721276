# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Drawing on GPUs without sorting: where top-k and top-p end is searched for, four bits at a time.

A token's weight is a 64-bit integer, so sums do not depend on the order in which programs add. A
logit's key is its bits in an order that integers have. Every program takes one block of one row,
and begins with the sums that all blocks of its row left in the launch before.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .rows import MASKED, PENALIZED, Adjustments, RowInputs

_BLOCK = 4096
_BITS = 4
_PASSES = 32 // _BITS
_STATE = 3


def sample(logits: Tensor, rows: RowInputs, adjustments: Adjustments) -> tuple[Tensor, Tensor]:
    """As the package's."""
    count, vocab = logits.shape
    blocks, device = -(-vocab // _BLOCK), logits.device
    adjusted = torch.empty(count, vocab, dtype=torch.float32, device=device)
    # Of a block: its highest logit and the sum of exponentials, as they came; the highest adjusted.
    found = torch.empty(count, 3, blocks, dtype=torch.float32, device=device)
    bins = torch.empty(2, _PASSES, count, blocks, 2**_BITS, dtype=torch.int64, device=device)
    state = torch.empty(2, _PASSES, count, _STATE, dtype=torch.int64, device=device)
    # Of a block: the weight above the searched key, and how many tokens have it.
    parts = torch.empty(2, count, 2, blocks, dtype=torch.int64, device=device)
    ends = torch.empty(2, count, 2, dtype=torch.int64, device=device)
    tokens = torch.empty(count, dtype=torch.int32, device=device)
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    if not count:
        return tokens, logprobs
    grid, padded = (blocks, count), triton.next_power_of_2(blocks)
    _adjust[grid](
        logits, rows.storage, adjustments.bias, adjustments.answered, adjustments.seen,
        adjustments.mask, adjusted, found, logits.stride(0), adjustments.mask.stride(0), vocab,
        blocks, BLOCK=_BLOCK, PENALIZED=PENALIZED, MASKED=MASKED, num_warps=4,
    )  # fmt: skip
    searched = adjusted, rows.storage, found, bins, state, parts, ends, vocab, blocks, count
    for by_weight in (0, 1):
        for number in range(_PASSES):
            _search[grid](
                *searched, BY_WEIGHT=by_weight, NUMBER=number, BLOCK=_BLOCK, BLOCKS=padded,
                BITS=_BITS, PASSES=_PASSES, num_warps=8,
            )  # fmt: skip
        _weigh[grid](
            *searched, BY_WEIGHT=by_weight, BLOCK=_BLOCK, BLOCKS=padded, BITS=_BITS,
            PASSES=_PASSES, num_warps=8,
        )  # fmt: skip
    _draw[(count,)](
        logits, adjusted, rows.storage, found, parts, ends, tokens, logprobs, logits.stride(0),
        vocab, blocks, count, BLOCK=_BLOCK, BLOCKS=padded, num_warps=8,
    )  # fmt: skip
    return tokens, logprobs


@triton.jit
def _key(x):
    """Float32 as an int64 from 0 to 2^32 - 1, in the same order."""
    bits = (x + 0.0).to(tl.int32, bitcast=True).to(tl.int64)
    return tl.where(bits >= 0, bits + 2147483648, -1 - bits)


@triton.jit
def _of_key(key):
    """The float32 that has a key."""
    bits = tl.where(key >= 2147483648, key - 2147483648, -1 - key)
    return bits.to(tl.int32).to(tl.float32, bitcast=True)


@triton.jit
def _weight(x, best, temperature):
    """exp((x - best) / temperature) in units of 2^-40."""
    return (tl.exp((x - best) / temperature) * 1099511627776.0).to(tl.int64)


@triton.jit
def _best_of(found, row, blocks, BLOCKS: tl.constexpr):
    """The highest adjusted logit of a row."""
    block = tl.arange(0, BLOCKS)
    place = found + (row * 3 + 2) * blocks + block
    return tl.max(tl.load(place, mask=block < blocks, other=float("-inf")), 0)


@triton.jit
def _adjust(
    logits,
    rows,
    bias,
    answered,
    seen,
    masks,
    adjusted,
    found,
    row_stride,
    mask_stride,
    vocab,
    blocks,
    BLOCK: tl.constexpr,
    PENALIZED: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Bring the counts of a block up to date, and change its logits by them."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocab
    x = tl.load(logits + row * row_stride + token, mask=exists, other=float("-inf"))
    x = x.to(tl.float32)
    result = found + row * 3 * blocks + block
    highest = tl.max(x, 0)
    tl.store(result, highest)
    tl.store(result + blocks, tl.sum(tl.where(x == float("-inf"), 0.0, tl.exp(x - highest)), 0))
    asked = rows + row * 12
    flags = tl.load(asked + 5).to(tl.int32)
    if flags & MASKED:
        word = tl.load(masks + row * mask_stride + (token >> 5), mask=exists, other=0)
        x = tl.where(((word >> (token & 31)) & 1) == 1, x, float("-inf"))
    if flags & PENALIZED:
        place = row * vocab + token
        is_newest = token == tl.load(asked + 9).to(tl.int32)
        times = tl.load(answered + place, mask=exists, other=0.0)
        times = tl.where(is_newest, tl.load(asked + 10).to(tl.float32), times)
        tl.store(answered + place, times, mask=is_newest)
        had = (tl.load(seen + place, mask=exists, other=0) > 0) | is_newest
        tl.store(seen + place, had.to(tl.uint8), mask=is_newest)
        x += tl.load(bias + place, mask=exists, other=0.0)
        repetition = tl.load(asked + 6).to(tl.float32)
        x = tl.where(had, tl.where(x > 0, tl.div_rn(x, repetition), x * repetition), x)
        x -= tl.load(asked + 7).to(tl.float32) * times
        x -= tl.where(times > 0, tl.load(asked + 8).to(tl.float32), 0.0)
    tl.store(adjusted + row * vocab + token, x, mask=exists)
    tl.store(result + 2 * blocks, tl.max(x, 0))


@triton.jit
def _narrow_down(
    bins, state, place, row, blocks, count, SHIFT: tl.constexpr, BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
):  # fmt: skip
    """Which four bits the searched key has, from what the pass `place` has left.

    Returns:
        the key so far; the sum over greater keys than those that begin so; and what is searched
        for: the greatest key with which the sum reaches it.
    """
    choices: tl.constexpr = 2**BITS
    block = tl.arange(0, BLOCKS)
    choice = tl.arange(0, choices)
    held = bins + ((place * count + row) * blocks + block)[:, None] * choices + choice[None, :]
    sums = tl.sum(tl.load(held, mask=(block < blocks)[:, None], other=0), 0)
    before = state + (place * count + row) * 3
    target = tl.load(before + 2)
    # Of each choice, the sum over it and all greater ones.
    reached = tl.load(before + 1) + tl.sum(sums, 0) - tl.cumsum(sums, 0) + sums
    chosen = tl.maximum(tl.sum((reached >= target).to(tl.int32), 0) - 1, 0)
    above = tl.sum(tl.where(choice == chosen, reached - sums, 0), 0)
    return tl.load(before) + (chosen.to(tl.int64) << SHIFT), above, target


@triton.jit
def _search(
    adjusted,
    rows,
    found,
    bins,
    state,
    parts,
    ends,
    vocab,
    blocks,
    count,
    BY_WEIGHT: tl.constexpr,
    NUMBER: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    PASSES: tl.constexpr,
):
    """One pass: how many tokens, or which weight, each choice of the next four bits has.

    First the key of the last token that top-k leaves is searched for, by counting; then that of
    the last that top-p leaves of those, by weights.
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    choices: tl.constexpr = 2**BITS
    shift: tl.constexpr = 32 - BITS * (NUMBER + 1)
    place = BY_WEIGHT * PASSES + NUMBER
    asked = rows + row * 12
    # Where top-k is off there is nothing to search for.
    if (BY_WEIGHT == 0) & (tl.load(asked + 1) >= vocab):
        return
    temperature = tl.load(asked).to(tl.float32)
    best = _best_of(found, row, blocks, BLOCKS)
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocab
    x = tl.load(adjusted + row * vocab + token, mask=exists, other=float("-inf"))
    keys = _key(x)
    if NUMBER > 0:
        key, above, target = _narrow_down(
            bins, state, place - 1, row, blocks, count, shift + BITS, BLOCKS, BITS
        )
    else:
        key = tl.zeros([], tl.int64)
        above = tl.zeros([], tl.int64)
        if BY_WEIGHT:
            target = _top_p_target(asked, parts, ends, row, blocks, best, temperature, BLOCKS)
        else:
            target = tl.load(asked + 1).to(tl.int64)
    if BY_WEIGHT:
        weights = tl.where(exists, _weight(x, best, temperature), 0)
    else:
        weights = exists.to(tl.int64)
    begins_so = (keys >> (shift + BITS)) == (key >> (shift + BITS))
    digit = (keys >> shift) & (choices - 1)
    held = bins + ((place * count + row) * blocks + block) * choices
    for choice in tl.static_range(choices):
        tl.store(held + choice, tl.sum(tl.where(begins_so & (digit == choice), weights, 0), 0))
    if block == 0:
        own = state + (place * count + row) * 3
        tl.store(own, key)
        tl.store(own + 1, above)
        tl.store(own + 2, target)


@triton.jit
def _top_p_target(asked, parts, ends, row, blocks, best, temperature, BLOCKS: tl.constexpr):
    """The weight that top-p must reach, a part of what top-k leaves; at least 1."""
    block = tl.arange(0, BLOCKS)
    above = tl.load(parts + row * 2 * blocks + block, mask=block < blocks, other=0)
    left = tl.load(ends + row * 2 + 1)
    last = _weight(_of_key(tl.load(ends + row * 2)), best, temperature)
    total = tl.sum(above, 0) + tl.where(left > 0, left * last, 0)
    part = tl.ceil(tl.load(asked + 2) * total.to(tl.float64)).to(tl.int64)
    return tl.maximum(tl.minimum(part, total), 1)


@triton.jit
def _weigh(
    adjusted,
    rows,
    found,
    bins,
    state,
    parts,
    ends,
    vocab,
    blocks,
    count,
    BY_WEIGHT: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BITS: tl.constexpr,
    PASSES: tl.constexpr,
):
    """Behind a search: of a block, the weight above its key, and how many tokens have the key.

    `ends` gets the key, and how many tokens that have it are left, those of the lowest ids.
    """
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    asked = rows + row * 12
    temperature = tl.load(asked).to(tl.float32)
    best = _best_of(found, row, blocks, BLOCKS)
    key, above, target = _narrow_down(
        bins, state, BY_WEIGHT * PASSES + PASSES - 1, row, blocks, count, 0, BLOCKS, BITS
    )
    left = target - above
    if not BY_WEIGHT:
        # Where top-k is off nothing was searched for: all keys are greater than -1.
        is_off = tl.load(asked + 1) >= vocab
        key = tl.where(is_off, -1, key)
        left = tl.where(is_off, 0, left)
    if BY_WEIGHT:
        last = tl.maximum(_weight(_of_key(key), best, temperature), 1)
        left = (left + last - 1) // last
        most = tl.where(key == tl.load(ends + row * 2), tl.load(ends + row * 2 + 1), left)
        left = tl.minimum(left, most)
    token = block * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocab
    x = tl.load(adjusted + row * vocab + token, mask=exists, other=float("-inf"))
    keys = _key(x)
    weights = tl.where(exists & (keys > key), _weight(x, best, temperature), 0)
    if BY_WEIGHT:
        weights = tl.where(_may_come(x, asked, best, temperature), weights, 0)
    own = parts + (BY_WEIGHT * count + row) * 2 * blocks + block
    tl.store(own, tl.sum(weights, 0))
    tl.store(own + blocks, tl.sum((exists & (keys == key)).to(tl.int64), 0))
    if block == 0:
        end = ends + (BY_WEIGHT * count + row) * 2
        tl.store(end, key)
        tl.store(end + 1, left)


@triton.jit
def _may_come(x, asked, best, temperature):
    """Whether min-p leaves a logit."""
    least = tl.log(tl.load(asked + 3)).to(tl.float32)
    return (x - best) / temperature >= least


@triton.jit
def _draw(
    logits,
    adjusted,
    rows,
    found,
    parts,
    ends,
    tokens,
    logprobs,
    row_stride,
    vocab,
    blocks,
    count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """One row: the block that the draw falls into, and the token in it."""
    row = tl.program_id(0).to(tl.int64)
    asked = rows + row * 12
    temperature = tl.load(asked).to(tl.float32)
    best = _best_of(found, row, blocks, BLOCKS)
    end = ends + (count + row) * 2
    key = tl.load(end)
    left = tl.load(end + 1)
    last = _of_key(key)
    weight = tl.where(
        _may_come(last, asked, best, temperature), _weight(last, best, temperature), 0
    )

    block = tl.arange(0, BLOCKS)
    there = block < blocks
    own = parts + (count + row) * 2 * blocks + block
    above = tl.load(own, mask=there, other=0)
    equal = tl.load(own + blocks, mask=there, other=0)
    equal_before = tl.cumsum(equal, 0) - equal
    kept = tl.minimum(tl.maximum(left - equal_before, 0), equal)
    of_block = above + kept * weight
    total = tl.sum(of_block, 0)
    drawn = (tl.load(asked + 4) * total.to(tl.float64)).to(tl.int64)
    drawn = tl.minimum(drawn, tl.maximum(total - 1, 0))
    reached = tl.cumsum(of_block, 0)
    chosen = tl.minimum(tl.sum((reached <= drawn).to(tl.int32), 0), blocks - 1)
    drawn -= tl.sum(tl.where(block == chosen, reached - of_block, 0), 0)
    left -= tl.sum(tl.where(block == chosen, equal_before, 0), 0)

    token = chosen * BLOCK + tl.arange(0, BLOCK)
    exists = token < vocab
    x = tl.load(adjusted + row * vocab + token, mask=exists, other=float("-inf"))
    keys = _key(x)
    equals = (exists & (keys == key)).to(tl.int64)
    stays = (keys > key) | ((equals > 0) & (tl.cumsum(equals, 0) <= left))
    stays = stays & exists & _may_come(x, asked, best, temperature)
    sums = tl.cumsum(tl.where(stays, _weight(x, best, temperature), 0), 0)
    result = chosen * BLOCK + tl.sum((sums <= drawn).to(tl.int32), 0)
    result = tl.minimum(result, vocab - 1)
    tl.store(tokens + row, result)

    tops = found + row * 3 * blocks + block
    highest = tl.load(tops, mask=there, other=float("-inf"))
    exponentials = tl.load(tops + blocks, mask=there, other=0.0)
    peak = tl.max(highest, 0)
    shrunk = tl.where(exponentials == 0.0, 0.0, exponentials * tl.exp(highest - peak))
    own_logit = tl.load(logits + row * row_stride + result).to(tl.float32)
    tl.store(logprobs + row, own_logit - peak - tl.log(tl.sum(shrunk, 0)))
