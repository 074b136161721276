"""Rotary positions of one model: dual chunk where the checkpoint says so, plain otherwise."""

import math

import torch
from torch import Tensor

from ..kernels.dual_chunk.segments import Rotation, SegmentQueries, rotation
from .config import ModelConfig


class RotaryPositions:
    """Rotates keys once, and queries as the segments demand; knows the softmax scale.

    Source: Dual Chunk Attention (arXiv 2402.17463) with YaRN's temperature (arXiv 2309.00071),
    as in Qwen2.5-1M (arXiv 2501.15383).
    """

    def __init__(self, config: ModelConfig) -> None:
        self._dual_chunk = config.dual_chunk
        self._head_dim = config.head_dim
        self._theta = config.rope_theta

    @property
    def stride(self) -> int | None:
        """Tokens of one dual chunk; None for plain positions."""
        return None if self._dual_chunk is None else self._dual_chunk.stride

    def keys(self, k: Tensor, positions: Tensor) -> Tensor:
        """Rotate k [n, kv_heads, d] for the cache; `positions` int64 [n] in the sequence."""
        return self.key_rotation(positions).apply(k)

    def key_rotation(self, positions: Tensor) -> Rotation:
        """What `keys` rotates by."""
        return self._rotation(positions if self.stride is None else positions % self.stride)

    def queries(self, q: Tensor, positions: Tensor) -> SegmentQueries:
        """Rotate q [n, heads, d] for each segment, as attention sees it."""
        if self._dual_chunk is None:
            rotated = self._rotation(positions).apply(q)
            return SegmentQueries(rotated, rotated, rotated)
        size, stride = self._dual_chunk.chunk_size, self._dual_chunk.stride
        offsets = positions % stride
        farthest = torch.full_like(positions, size)
        return SegmentQueries(
            self._rotation(offsets).apply(q),
            self._rotation(torch.clamp(offsets + stride, max=size)).apply(q),
            self._rotation(farthest).apply(q),
        )

    def selection_queries(self, q: Tensor, positions: Tensor) -> SegmentQueries:
        """Rotate q as the selection of sparse attention sees it: positions go on without a clamp.

        The jumps of dual chunks would break the diagonals that selection looks for (arXiv
        2501.15383, section 5.1).
        """
        if self._dual_chunk is None:
            return self.queries(q, positions)
        size, stride = self._dual_chunk.chunk_size, self._dual_chunk.stride
        offsets = positions % stride
        return SegmentQueries(
            self._rotation(offsets).apply(q),
            self._rotation(offsets + stride).apply(q),
            self._rotation(offsets + size).apply(q),
        )

    def softmax_scale(self, length: int) -> float:
        """What logits are multiplied by in a sequence of `length` tokens: m² / sqrt(head_dim)."""
        scale = self._head_dim**-0.5
        if self._dual_chunk is None:
            return scale
        beyond = length / self._dual_chunk.original_max_position_embeddings
        temperature = max(1.0, 0.1 * math.log(beyond) + 1.0)
        return scale * temperature * temperature

    def _rotation(self, positions: Tensor) -> Rotation:
        return rotation(positions, self._head_dim, self._theta)
