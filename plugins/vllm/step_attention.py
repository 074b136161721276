"""Attention of all rows of a step, layer by layer: decodes, and pieces of prompts.

Nothing here knows whose step it is. Keys are rotated and written once, as every later row sees
them: no key depends on how long its prompt becomes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from ...engine.model.positions import Rotations
from ...kernels import elementwise
from ...kernels.dual_chunk.segments import Rotation
from .decode_rows import DecodeRows
from .model_attention import ModelAttention
from .piece_attention import PieceAttention


class PlainAttention(Protocol):
    """Causal attention of all rows of a step, where no sequence is beyond its first dual chunk."""

    def __call__(self, queries: Tensor, memory: Tensor, scale: float, output: Tensor) -> None:
        """Fill in `output`; shapes as those of `StepAttention.attend`, queries rotated."""
        ...


@dataclass
class _Kept:
    """Rotations that the layers of a step share, once the first of them has made them."""

    keys: Rotation
    decodes: Rotations | None
    captured: bool


class StepAttention:
    """What all layers of a step have in common.

    Args:
        positions: int64 [rows or more], of each row in its sequence.
        slots: int64 [rows or more], page * 128 + offset of each row; -1 for one without a place.
        decodes: the first rows; None where there are none.
        pieces: of the rows behind them.
        plain: for a step of short sequences alone; None for kernels of ours, or another step.
    """

    def __init__(
        self,
        model: ModelAttention,
        rows: int,
        positions: Tensor,
        slots: Tensor,
        decodes: DecodeRows | None,
        pieces: Sequence[PieceAttention],
        plain: PlainAttention | None = None,
    ) -> None:
        self._model, self._rows = model, rows
        self._positions, self._slots = positions[:rows], slots[:rows]
        self._decodes, self._pieces, self._plain = decodes, pieces, plain
        self._kept: _Kept | None = None

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, memory: Tensor, output: Tensor
    ) -> None:
        """Write K and V of one layer's rows, and fill in what attention makes of them.

        Args:
            q: not rotated, [rows or more, heads, d]; k and v: [rows or more, kv_heads, d].
            memory: the layer's pages, [pages, kv_heads, 2, 128, d].
            output: [rows or more, heads, d]; rows beyond are left as they are.
        """
        rows, kept = self._rows, self._rotations()
        q = q[:rows]
        elementwise.write_pages(memory, self._slots, k[:rows], v[:rows], kept.keys)
        if self._plain is not None:
            rotated = elementwise.rotate_queries(q, kept.keys, kept.keys, kept.keys)
            self._plain(
                rotated.intra, memory, self._model.positions.softmax_scale(1), output[:rows]
            )
            return
        if self._decodes is not None and kept.decodes is not None:
            count = self._decodes.count
            output[:count] = self._decodes.attend(kept.decodes.rotate(q[:count]), memory)
        for piece in self._pieces:
            piece.attend(layer, q[piece.rows], memory, output[piece.rows])

    def _rotations(self) -> _Kept:
        """Made by the first layer; anew inside a CUDA graph, whose replays find other positions."""
        captured = self._positions.is_cuda and torch.cuda.is_current_stream_capturing()
        if self._kept is None or self._kept.captured != captured:
            self._kept = self._make(captured)
        return self._kept

    def _make(self, captured: bool) -> _Kept:
        positions, count = (
            self._model.positions,
            0 if self._decodes is None else self._decodes.count,
        )
        decodes = positions.rotations(self._positions[:count]) if count else None
        if decodes is not None and count == self._rows:
            return _Kept(decodes.intra, decodes, captured)
        return _Kept(positions.key_rotation(self._positions), decodes, captured)
