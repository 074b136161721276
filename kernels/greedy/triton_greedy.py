# pyright: reportCallIssue=false
# Triton types a launch as the kernel itself, which has no parameter `num_warps`.
"""Greedy sampling on GPUs: the logits are read once, in blocks, whose results are then merged."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 4096


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As the package's; rows may lie apart."""
    count, vocab = logits.shape
    blocks = -(-vocab // _BLOCK)
    device = logits.device
    maxima = torch.empty(count, blocks, dtype=torch.float32, device=device)
    sums = torch.empty_like(maxima)
    places = torch.empty(count, blocks, dtype=torch.int32, device=device)
    tokens = torch.empty(count, dtype=torch.int32, device=device)
    logprobs = torch.empty(count, dtype=torch.float32, device=device)
    if count:
        _best_of_block[(blocks, count)](
            logits, maxima, sums, places, logits.stride(0), vocab, blocks, BLOCK=_BLOCK, num_warps=4
        )
        _best_of_row[(count,)](
            maxima,
            sums,
            places,
            tokens,
            logprobs,
            blocks,
            BLOCKS=triton.next_power_of_2(blocks),
            num_warps=1,
        )
    return tokens, logprobs


@triton.jit
def _best_of_block(logits, maxima, sums, places, row_stride, vocab, blocks, BLOCK: tl.constexpr):
    """Highest logit of one block of one row, its token, and the sum of weights relative to it."""
    block = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    token = block * BLOCK + tl.arange(0, BLOCK)
    source = logits + row * row_stride + token
    x = tl.load(source, mask=token < vocab, other=float("-inf")).to(tl.float32)
    highest = tl.max(x, 0)
    # A token that cannot come weighs nothing, in a block where none can as well.
    weights = tl.where(x == float("-inf"), 0.0, tl.exp(x - highest))
    result = row * blocks + block
    tl.store(maxima + result, highest)
    tl.store(sums + result, tl.sum(weights, 0))
    # Among NaN any place may come out as the best: also one behind the row, which is no token.
    place = block * BLOCK + tl.argmax(x, 0, tie_break_left=True)
    tl.store(places + result, tl.minimum(place, vocab - 1))


@triton.jit
def _best_of_row(maxima, sums, places, tokens, logprobs, blocks, BLOCKS: tl.constexpr):
    """The best of a row's blocks, the first among equals."""
    row = tl.program_id(0)
    block = tl.arange(0, BLOCKS)
    source = row.to(tl.int64) * blocks + block
    exists = block < blocks
    highest = tl.load(maxima + source, mask=exists, other=float("-inf"))
    weights = tl.load(sums + source, mask=exists, other=0.0)
    tops = tl.load(places + source, mask=exists, other=0)
    best = tl.max(highest, 0)
    weights = tl.where(weights == 0.0, 0.0, weights * tl.exp(highest - best))
    winner = tl.argmax(highest, 0, tie_break_left=True)
    tl.store(tokens + row, tl.sum(tl.where(block == winner, tops, 0), 0))
    tl.store(logprobs + row, -tl.log(tl.sum(weights, 0)))
