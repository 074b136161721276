"""The decode step in plain PyTorch, one sequence's attention after the other."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels import dual_chunk, quantized
from ...kernels.narrow import Rows
from ...kernels.pages import write_pages
from ..kv.pages import PagePool
from ..model.layer import Attention, Layer
from ..model.positions import RotaryPositions
from ..model.qwen2 import Qwen2
from .sampler import best_token
from .step import DecodeStep, Outcome, StepRow


class PortableStep(DecodeStep):
    """A model that is whole on its device, of any kind."""

    def __init__(self, model: Qwen2, pool: PagePool, max_batch: int) -> None:
        self._model = model
        self._pool = pool
        self._max_batch = max_batch

    @torch.inference_mode()
    def run(self, rows: Sequence[StepRow]) -> list[Outcome]:
        """As `DecodeStep.run`.

        The batch is filled up with rows of zeros: a matrix product's rounding may depend on how
        many rows it has, and an answer must not depend on what else is in the batch.
        """
        model = self._model
        tokens = torch.zeros(self._max_batch, dtype=torch.int64, device=model.device)
        tokens[: len(rows)] = torch.tensor([row.token for row in rows], device=model.device)
        attention = _RowByRow(self._pool, model.positions, rows, model.device)
        hidden = model.begin(tokens)
        for layer in model.layers:
            layer.forward(hidden, attention)
        logits = model.logits(hidden[0])[: len(rows)].float().cpu().numpy()
        return [
            best_token(own) if row.takes_best else np.ascontiguousarray(own)
            for row, own in zip(rows, logits, strict=True)
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
