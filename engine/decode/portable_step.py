"""The decode step in plain PyTorch, one sequence's attention after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels import dual_chunk, elementwise, quantized
from ...kernels.dual_chunk import SegmentQueries
from ...kernels.dual_chunk.ragged_plan import page_blocks
from ...kernels.narrow import Rows, rows_at
from ...kernels.pages import write_pages
from ..kv.pages import PagePool
from ..model.layer import Attention, Layer
from ..model.positions import RotaryPositions
from ..model.qwen2 import Qwen2
from .sampler import best_token
from .step import DecodeStep, HasRun, Outcome, PromptPiece, StepRow

_LEAST_ROWS = 16
"""From here on, and a little earlier, products round a row alike however many rows there are."""


class PortableStep(DecodeStep):
    """A model that is whole on its device, of any kind."""

    def __init__(self, model: Qwen2, pool: PagePool, max_batch: int) -> None:
        self._model = model
        self._pool = pool
        self._max_batch = max_batch

    @torch.inference_mode()
    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> HasRun:
        """As `DecodeStep.launch`; rows and pieces go through the model one after the other.

        The batch is filled up with rows of zeros: a matrix product's rounding may depend on how
        many rows it has, and an answer must not depend on what else is in the batch.
        """
        outcomes = self._outcomes(rows, self._run_rows(rows)) if rows else []
        if pieces:
            ending = [piece for piece in pieces if piece.ends]
            outcomes += self._outcomes(ending, self._run_pieces(pieces))
        return HasRun(outcomes)

    def _run_rows(self, rows: Sequence[StepRow]) -> Tensor:
        """Logits [rows, vocab]."""
        model = self._model
        tokens = torch.zeros(self._max_batch, dtype=torch.int64, device=model.device)
        tokens[: len(rows)] = torch.tensor([row.token for row in rows], device=model.device)
        attention = _RowByRow(self._pool, model.positions, rows, model.device)
        hidden = model.begin(tokens)
        for layer in model.layers:
            layer.forward(hidden, attention)
        return model.logits(hidden[0])[: len(rows)]

    def _run_pieces(self, pieces: Sequence[PromptPiece]) -> Tensor:
        """Logits [pieces that end their prompt, vocab]."""
        model = self._model
        given = np.concatenate([piece.tokens for piece in pieces])
        tokens = np.zeros(max(len(given), _LEAST_ROWS), dtype=np.int64)
        tokens[: len(given)] = given
        attention = _PieceByPiece(self._pool, model.positions, pieces, model.device)
        hidden = model.begin(torch.from_numpy(tokens).to(model.device))
        for layer in model.layers:
            layer.forward(hidden, attention)
        ends = np.cumsum([piece.count for piece in pieces]) - 1
        last = [end for piece, end in zip(pieces, ends.tolist(), strict=True) if piece.ends]
        # As many rows as a step has, for the same reason.
        padded = torch.tensor([*last, *[0] * (self._max_batch - len(last))], device=model.device)
        return model.logits(rows_at(hidden[0], padded))[: len(last)]

    def _outcomes(
        self, asked: Sequence[StepRow] | Sequence[PromptPiece], logits: Tensor
    ) -> list[Outcome]:
        on_host = logits.float().cpu().numpy()
        return [
            best_token(own) if each.takes_best else np.ascontiguousarray(own)
            for each, own in zip(asked, on_host, strict=True)
        ]


class _RowByRow(Attention[Tensor]):
    """Attention of the first rows of a step; zero for those that only fill it up."""

    def __init__(
        self,
        pool: PagePool,
        positions: RotaryPositions,
        rows: Sequence[StepRow],
        device: torch.device,
    ) -> None:
        self._pool, self._rotary, self._rows = pool, positions, rows
        self._positions = torch.tensor([row.length for row in rows], device=device)
        self._tables = [row.table.pages.tolist() for row in rows]

    def write(self, layer: Layer, normed: Rows) -> Tensor:
        """Returns: queries of all rows, not rotated."""
        q, k, v = layer.project(normed)
        used = slice(0, len(self._rows))
        self._write(layer.number, k[used], v[used])
        return q

    def attend(self, layer: Layer, queries: Tensor) -> Tensor:
        rotated = self._rotary.queries(queries[: len(self._rows)], self._positions)
        attended = torch.zeros_like(queries)
        for index, (row, table) in enumerate(zip(self._rows, self._tables, strict=True)):
            one = slice(index, index + 1)
            attended[one] = dual_chunk.decode_attention(
                rotated.rows(one),
                self._pool.memory[layer.number],
                table,
                row.length + 1,
                self._rotary.stride,
                self._rotary.softmax_scale(row.length + 1),
                self._pool.layer_scales(layer.number),
            )
        return attended

    def _write(self, number: int, k: Tensor, v: Tensor) -> None:
        """Put each row's new K and V, [n, kv_heads, d] and not rotated, into its page."""
        memory, scales = self._pool.memory[number], self._pool.layer_scales(number)
        rotation = self._rotary.key_rotation(self._positions)
        if scales is not None:
            slots = torch.tensor([row.slot for row in self._rows], device=k.device)
            quantized.append_tokens(memory, scales, slots, k, v, rotation)
            return
        keys = rotation.apply(k)
        for index, row in enumerate(self._rows):
            one = slice(index, index + 1)
            write_pages(memory, row.table.pages, row.length, keys[one], v[one])


_Rotated = tuple[SegmentQueries, int]


class _PieceByPiece(Attention[_Rotated]):
    """Attention of pieces of prompts, whose rows come first; zero for rows behind them."""

    def __init__(
        self,
        pool: PagePool,
        positions: RotaryPositions,
        pieces: Sequence[PromptPiece],
        device: torch.device,
    ) -> None:
        self._pool, self._stride = pool, positions.stride
        scales = [positions.softmax_scale(len(piece.prompt)) for piece in pieces]
        self._parts = [piece.rows(scale) for piece, scale in zip(pieces, scales, strict=True)]
        where = torch.from_numpy(np.concatenate([piece.positions for piece in pieces])).to(device)
        self._rotations = positions.rotations(where, range(max(piece.end for piece in pieces)))
        slots = np.concatenate([piece.slots for piece in pieces])
        self._slots = torch.from_numpy(slots).to(device)
        self._blocks = torch.tensor(page_blocks(self._parts), dtype=torch.int32, device=device)

    def write(self, layer: Layer, normed: Rows) -> _Rotated:
        """Returns: rotated queries of the pieces' rows, and how many rows there are in all."""
        q, k, v = layer.project(normed)
        used = slice(0, len(self._slots))
        memory, scales = self._pool.memory[layer.number], self._pool.layer_scales(layer.number)
        own = k[used], v[used], self._rotations.intra
        if scales is None:
            elementwise.write_pages(memory, self._slots, *own)
        else:
            quantized.narrow_blocks(memory, scales, self._blocks, *own)
        return self._rotations.rotate(q[used]), len(q)

    def attend(self, layer: Layer, queries: _Rotated) -> Tensor:
        rotated, count = queries
        attended = rotated.intra.new_zeros(count, *rotated.intra.shape[1:])
        attended[: len(self._slots)] = dual_chunk.ragged_attention(
            rotated,
            self._pool.memory[layer.number],
            self._parts,
            self._stride,
            self._pool.layer_scales(layer.number),
        )
        return attended
