"""One random attention problem over pages, with its definition beside it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longreach.engine.config import DualChunk, ModelConfig
from longreach.engine.positions import RotaryPositions
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries, reference
from longreach.kernels.pages import LayerPages, write_pages

THETA = 1e4
SCALE = 0.3
CHUNK, LOCAL = 200, 77


@dataclass
class Problem:
    """q, k, v are unrotated, [length, heads, d]; `logits` float64 [heads, length, length]."""

    length: int
    q: Tensor
    v: Tensor
    pages: LayerPages
    positions: RotaryPositions
    logits: Tensor

    def queries(self, blocks: QueryBlocks) -> SegmentQueries:
        where = blocks.positions()
        return self.positions.queries(self.q[where], where)


def make_problem(length: int, dual: bool, heads: int = 4, kv_heads: int = 2) -> Problem:
    """Pages lie in a poisoned pool, in an order of their own."""
    generator = torch.Generator().manual_seed(length)
    head_dim = 16
    q = torch.randn(length, heads, head_dim, generator=generator)
    k, v = (torch.randn(length, kv_heads, head_dim, generator=generator) for _ in range(2))
    config = ModelConfig(
        1, 1, 1, 1, heads, kv_heads, head_dim, 1e-6, THETA, True, 4096,
        DualChunk(CHUNK, LOCAL, CHUNK) if dual else None, (),
    )  # fmt: skip
    positions = RotaryPositions(config)
    num_pages = -(-length // 128)
    table = np.random.default_rng(length).permutation(num_pages + 3)[:num_pages]
    memory = torch.full((num_pages + 3, kv_heads, 2, 128, head_dim), torch.nan)
    write_pages(memory, table.tolist(), 0, positions.keys(k, torch.arange(length)), v)
    if dual:
        relative = reference.relative_positions(length, CHUNK, LOCAL)
    else:
        relative = reference.plain_positions(length)
    logits = reference.scores(q, k, relative, THETA, SCALE)
    return Problem(length, q, v, LayerPages.of(memory, table.tolist()), positions, logits)
