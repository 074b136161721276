"""One random layer of a model of real size, and exact attention of single rows of it."""

import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from ...kernels.dual_chunk.segments import KeyBounds, QueryBlocks, SegmentQueries
from ...kernels.page_size import PAGE_TOKENS
from ...kernels.pages import BlockTable, LayerPages
from ...kernels.sparse import Selections

STRIDE = 253_952
"""Tokens of one dual chunk of the Qwen2.5-1M models."""

CHUNK_TOKENS = 32_768


@dataclass(frozen=True)
class Shape:
    """Heads of one layer."""

    name: str
    heads: int
    kv_heads: int
    head_dim: int

    @property
    def group(self) -> int:
        """Query heads that share a KV head."""
        return self.heads // self.kv_heads


QWEN_7B = Shape("7B 28/4x128", 28, 4, 128)
QWEN_14B = Shape("14B 40/8x128", 40, 8, 128)


@dataclass(frozen=True, eq=False)
class Layer:
    """The last chunk of a prompt of `length` tokens: queries, and pages in any order."""

    shape: Shape
    length: int
    queries: SegmentQueries
    memory: Tensor
    table: BlockTable

    @classmethod
    def random(cls, shape: Shape, length: int, device: torch.device) -> "Layer":
        """Normally distributed, in bfloat16; the same for the same arguments."""
        generator = torch.Generator(device).manual_seed(length)
        num_pages = length // PAGE_TOKENS
        memory = torch.empty(
            num_pages, shape.kv_heads, 2, PAGE_TOKENS, shape.head_dim,
            device=device, dtype=torch.bfloat16,
        ).normal_(generator=generator)  # fmt: skip
        rows = (CHUNK_TOKENS, shape.heads, shape.head_dim)
        queries = SegmentQueries(
            *(
                torch.empty(rows, device=device, dtype=torch.bfloat16).normal_(generator=generator)
                for _ in range(3)
            )
        )
        order = np.random.default_rng(length).permutation(num_pages)
        return cls(shape, length, queries, memory, BlockTable.of(order.tolist()))

    @property
    def scale(self) -> float:
        """Of the softmax."""
        return self.shape.head_dim**-0.5

    @property
    def pages(self) -> LayerPages:
        """Of the whole prompt."""
        return LayerPages(self.memory, self.table)

    @cached_property
    def blocks(self) -> QueryBlocks:
        """Of the last chunk."""
        last = self.length // PAGE_TOKENS
        return QueryBlocks(tuple(range(last - CHUNK_TOKENS // PAGE_TOKENS, last)), self.length)

    @property
    def flops(self) -> float:
        """Of causal attention of the chunk."""
        pairs = CHUNK_TOKENS * (self.length - CHUNK_TOKENS) + CHUNK_TOKENS**2 / 2
        return 4 * self.shape.head_dim * self.shape.heads * pairs

    def keys_values(self) -> tuple[Tensor, Tensor]:
        """In the prompt's order, without pages: [kv_heads, length, d] twice."""
        order = torch.from_numpy(self.table.pages).to(self.memory.device)
        pages = self.memory.index_select(0, order)
        k, v = (pages[:, :, which].transpose(0, 1).flatten(1, 2) for which in (0, 1))
        return k, v

    def exact(self, row: int, head: int, selections: Selections | None) -> tuple[Tensor, Tensor]:
        """Output [d] and log-sum-exp of one row, in float64."""
        position = self.length - CHUNK_TOKENS + row
        bounds = KeyBounds.of(position, STRIDE)
        order = torch.from_numpy(self.table.pages).to(self.memory.device)
        own = self.memory[:, head // self.shape.group].index_select(0, order)
        k, v = (own[:, which].flatten(0, 1)[: position + 1].double() for which in (0, 1))
        borders = (0, bounds.inter, bounds.successive, position + 1)
        each = (self.queries.inter, self.queries.successive, self.queries.intra)
        logits = torch.cat(
            [
                k[start:end] @ q[row, head].double()
                for q, start, end in zip(each, borders[:-1], borders[1:], strict=True)
            ]
        )
        logits *= self.scale
        if selections is not None:
            logits[~self._visible(position, head, selections)] = -math.inf
        return logits.softmax(0) @ v, logits.logsumexp(0)

    def _visible(self, position: int, head: int, selections: Selections) -> Tensor:
        columns, distances = selections.of_head(head)
        tile = position // PAGE_TOKENS
        seen = torch.zeros((tile + 1) * PAGE_TOKENS, dtype=torch.bool, device=self.memory.device)
        seen[torch.from_numpy(columns[columns < tile * PAGE_TOKENS].astype(np.int64))] = True
        listed = torch.from_numpy(tile - distances[distances <= tile].astype(np.int64))
        seen.view(-1, PAGE_TOKENS)[listed] = True
        return seen[: position + 1]

    def error(self, output: Tensor, lse: Tensor, selections: Selections | None = None) -> float:
        """The largest relative error of some rows' outputs, and of their log-sum-exp."""
        errors = [float("nan") if output.isnan().any() else 0.0]
        last = CHUNK_TOKENS - 1
        for row, head in ((0, 0), (77, self.shape.heads // 2), (last, self.shape.heads - 1)):
            exact, exact_lse = self.exact(row, head, selections)
            errors.append(float((output[row, head].double() - exact).norm() / exact.norm()))
            errors.append(float((lse[row, head] - exact_lse).abs() / exact_lse.abs()))
        return max(errors) if all(e == e for e in errors) else float("nan")


def sdpa_baseline(layer: Layer):
    """cuDNN's plain attention of the same pairs: the keys before the chunk, then the chunk's own.

    Two calls, each with the fastest layout for it; merging them, as one must, is left out.
    """
    k, v = (each[None] for each in layer.keys_values())
    if layer.length <= 2**17:
        k, v = (each.repeat_interleave(layer.shape.group, 1) for each in (k, v))
    grouped = k.shape[1] != layer.shape.heads
    q = layer.queries.intra.transpose(0, 1)[None].contiguous()
    before = layer.length - CHUNK_TOKENS

    def run() -> None:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            attend = torch.nn.functional.scaled_dot_product_attention
            attend(q, k[:, :, :before], v[:, :, :before], enable_gqa=grouped)
            attend(q, k[:, :, before:], v[:, :, before:], is_causal=True, enable_gqa=grouped)

    return run
