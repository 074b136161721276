"""Rotary positions of one model: dual chunk where the checkpoint says so, plain otherwise."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import elementwise
from ...kernels.dual_chunk.segments import Rotation, SegmentQueries, rotation
from .config import ModelConfig


@dataclass(frozen=True)
class Rotations:
    """Three rotations of the same rows; where two are equal they are one object.

    Keys are rotated as intra queries are. A rotation that no key of these rows is seen under may
    be any other: attention does not look at those queries.
    """

    intra: Rotation
    successive: Rotation
    inter: Rotation

    def rows(self, rows: slice) -> "Rotations":
        """The same rows of each."""
        cut: dict[int, Rotation] = {}
        for each in (self.intra, self.successive, self.inter):
            cut.setdefault(id(each), Rotation(each.cosine[rows], each.sine[rows]))
        return Rotations(cut[id(self.intra)], cut[id(self.successive)], cut[id(self.inter)])

    def rotate(self, q: Tensor) -> SegmentQueries:
        """Rotate q [n, heads, d] for each segment; one rotation makes one tensor."""
        if self.inter is not self.successive:
            return elementwise.rotate_queries(q, self.intra, self.successive, self.inter)
        rotated = elementwise.rotate_queries(q, self.intra, self.successive, self.intra)
        return SegmentQueries(rotated.intra, rotated.successive, rotated.successive)


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
        return self.rotations(positions).rotate(q)

    def selection_queries(self, q: Tensor, positions: Tensor) -> SegmentQueries:
        """Rotate q as the selection of sparse attention sees it; see `selection_rotations`."""
        return self.selection_rotations(positions).rotate(q)

    def rotations(self, positions: Tensor, within: range | None = None) -> Rotations:
        """What rows at `positions`, int64 [n], are rotated by, as attention sees them.

        Args:
            within: where all of them are known to lie; saves the rotations not needed there.
        """
        if self._dual_chunk is None or self._is_first(within):
            return self._plain(positions)
        size, stride = self._dual_chunk.chunk_size, self._dual_chunk.stride
        offsets = positions % stride
        if within is None:
            return self._all_three(offsets, offsets + stride, torch.full_like(positions, size))
        farthest = self._rotation(torch.full_like(positions, size))
        # Far enough into its dual chunk, a row's clamped position is that of inter queries.
        if _least_offset(within, stride) + stride >= size:
            return Rotations(self._rotation(offsets), farthest, farthest)
        successive = self._rotation(torch.clamp(offsets + stride, max=size))
        has_inter = within.stop > 2 * stride
        return Rotations(self._rotation(offsets), successive, farthest if has_inter else successive)

    def selection_rotations(self, positions: Tensor, within: range | None = None) -> Rotations:
        """As `rotations`, as selection of sparse attention sees them: they go on without a clamp.

        The jumps of dual chunks would break the diagonals that selection looks for (arXiv
        2501.15383, section 5.1).
        """
        if self._dual_chunk is None or self._is_first(within):
            return self._plain(positions)
        size, stride = self._dual_chunk.chunk_size, self._dual_chunk.stride
        offsets = positions % stride
        successive = self._rotation(offsets + stride)
        has_inter = within is None or within.stop > 2 * stride
        inter = self._rotation(offsets + size) if has_inter else successive
        return Rotations(self._rotation(offsets), successive, inter)

    def softmax_scale(self, length: int) -> float:
        """What logits are multiplied by in a sequence of `length` tokens: m² / sqrt(head_dim)."""
        scale = self._head_dim**-0.5
        if self._dual_chunk is None:
            return scale
        beyond = length / self._dual_chunk.original_max_position_embeddings
        temperature = max(1.0, 0.1 * math.log(beyond) + 1.0)
        return scale * temperature * temperature

    def _is_first(self, within: range | None) -> bool:
        """Whether all rows lie in the first dual chunk, where positions are plain."""
        return within is not None and self.stride is not None and within.stop <= self.stride

    def _all_three(self, offsets: Tensor, successive: Tensor, farthest: Tensor) -> Rotations:
        """Every angle in one go: for a few rows, launches are what takes time."""
        clamped = torch.minimum(successive, farthest)
        every = self._rotation(torch.cat((offsets, clamped, farthest)))
        return Rotations(
            *(
                Rotation(cosine, sine)
                for cosine, sine in zip(every.cosine.chunk(3), every.sine.chunk(3), strict=True)
            )
        )

    def _plain(self, positions: Tensor) -> Rotations:
        """One rotation for all segments."""
        intra = self._rotation(positions)
        return Rotations(intra, intra, intra)

    def _rotation(self, positions: Tensor) -> Rotation:
        return rotation(positions, self._head_dim, self._theta)


def _least_offset(within: range, stride: int) -> int:
    """The least offset in its dual chunk that a position in `within` can have."""
    first, last = within.start, within.stop - 1
    return first % stride if first // stride == last // stride else 0
