"""One random attention problem over pages, with its definition beside it."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from longreach.engine.model.config import DualChunk, ModelConfig
from longreach.engine.model.positions import RotaryPositions
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries, reference
from longreach.kernels.pages import LayerPages, write_pages

THETA = 1e4
SCALE = 0.3
CHUNK, LOCAL = 200, 77

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LOW_PRECISION = torch.bfloat16 if torch.cuda.is_available() else torch.float16
"""What kernels are made for; Triton's interpreter cannot multiply matrices of bfloat16."""


@dataclass
class Problem:
    """q, k, v are unrotated, [length, heads, d]; `logits` float64 [heads, length, length]."""

    length: int
    q: Tensor
    v: Tensor
    pages: LayerPages
    positions: RotaryPositions
    logits: Tensor
    scale: float

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.q.shape[1] // self.v.shape[1]

    def queries(self, blocks: QueryBlocks) -> SegmentQueries:
        where = blocks.positions()
        return self.positions.queries(self.q[where], where.to(self.q.device))

    def last_queries(self, rows: int) -> SegmentQueries:
        """The last rows, as selection wants them."""
        where = torch.arange(self.length - rows, self.length, device=self.q.device)
        return self.positions.selection_queries(self.q[where], where)


def make_problem(
    length: int,
    dual: bool,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 16,
    dtype: torch.dtype = torch.float32,
    chunk: tuple[int, int] = (CHUNK, LOCAL),
    device: torch.device | None = None,
    scale: float = SCALE,
) -> Problem:
    """Pages lie in a poisoned pool, in an order of their own."""
    generator = torch.Generator().manual_seed(length)
    device = device or torch.device("cpu")

    def random(count: int) -> Tensor:
        return torch.randn(length, count, head_dim, generator=generator).to(dtype)

    q, k, v = random(heads), random(kv_heads), random(kv_heads)
    config = ModelConfig(
        1, 1, 1, 1, heads, kv_heads, head_dim, 1e-6, THETA, True, 4096,
        DualChunk(*chunk, chunk[0]) if dual else None, (),
    )  # fmt: skip
    positions = RotaryPositions(config)
    num_pages = -(-length // 128)
    table = np.random.default_rng(length).permutation(num_pages + 3)[:num_pages]
    memory = torch.full((num_pages + 3, kv_heads, 2, 128, head_dim), torch.nan, dtype=dtype)
    write_pages(memory, table.tolist(), 0, positions.keys(k, torch.arange(length)), v)
    if dual:
        relative = reference.relative_positions(length, *chunk)
    else:
        relative = reference.plain_positions(length)
    logits = reference.scores(q, k, relative, THETA, scale)
    pages = LayerPages.of(memory.to(device), table.tolist())
    return Problem(length, q.to(device), v, pages, positions, logits, scale)


def make_small_problem(
    length: int,
    chunk: tuple[int, int] | None,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 64,
    dtype: torch.dtype = LOW_PRECISION,
) -> Problem:
    """As kernels meet it: 16 bits, on the GPU where there is one, logits scaled as models do."""
    return make_problem(
        length, chunk is not None, heads, kv_heads, head_dim, dtype, chunk or (CHUNK, LOCAL),
        DEVICE, head_dim**-0.5,
    )  # fmt: skip


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; NaN where anything is NaN."""
    expected = expected.double()
    return float((actual.cpu().double() - expected).norm() / expected.norm())
