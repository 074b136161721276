"""One step of decoding: a token more for every sequence of a batch, on CPUs and on GPUs.

Which implementation runs follows from the device that holds the model: see `make_step`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...kernels import dual_chunk, quantized
from ...kernels.pages import BlockTable, write_pages
from ..kv.pages import PAGE_TOKENS, PagePool
from ..messages import ChosenToken
from ..model.qwen2 import Layer, Qwen2
from .sampler import Logits, best_token

Outcome = Logits | ChosenToken
"""Logits [vocab] after a row's token; or the best token of them, where that is all one asked."""


@dataclass(frozen=True, eq=False)
class StepRow:
    """What one sequence brings to a step.

    `token` is at position `length`: so many tokens have K and V in the pages of `table` already.
    `takes_best`: the best token and its log-probability are wanted, and not the logits.
    """

    token: int
    length: int
    table: BlockTable
    takes_best: bool

    @property
    def slot(self) -> int:
        """Where the token's K and V go: page * 128 + offset."""
        page, offset = divmod(self.length, PAGE_TOKENS)
        return int(self.table.pages[page]) * PAGE_TOKENS + offset


class DecodeStep(ABC):
    """Runs a model over the newest tokens of a batch.

    The same object serves every step of one decoder, whatever sequences come and go.
    """

    @abstractmethod
    def run(self, rows: Sequence[StepRow]) -> list[Outcome]:
        """Write K and V of every row's token to its page, and say what may follow each.

        A step that failed may be run again: it writes the same to the same places.

        Args:
            rows: 1 to `max_batch` of them; their tables have a page for the token.

        Returns:
            for each row its best token, the lowest id among equals, where `takes_best`, with the
            model's own log-probability, which is not finite where the logits are not; else its
            logits, float32 [vocab], which the next step may overwrite.

        Raises:
            RuntimeError: the device's memory does not suffice for these rows, in any of the ways
                that `memory.out_of_memory` knows.
        """


def make_step(model: Qwen2, pool: PagePool, max_batch: int) -> DecodeStep:
    """The step that suits the model's device.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for a step of `max_batch`.
    """
    if model.device.type == "cuda":
        # Triton is installed where there is a GPU.
        from .graph_step import KernelStep, captured, programs_for, row_counts

        return KernelStep(
            model, pool, row_counts(max_batch), programs_for(model), captured(model.device)
        )
    return PortableStep(model, pool, max_batch)


class PortableStep(DecodeStep):
    """In plain PyTorch, one sequence's attention after the other."""

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
        positions = torch.tensor([row.length for row in rows], device=model.device)
        tokens = torch.zeros(self._max_batch, dtype=torch.int64, device=model.device)
        tokens[: len(rows)] = torch.tensor([row.token for row in rows], device=model.device)
        tables = [row.table.pages.tolist() for row in rows]
        residual = model.embed(tokens)
        normed = model.layers[0].input_norm(residual)
        for number, layer in enumerate(model.layers):
            attended = self._attend(number, layer, normed, rows, tables, positions)
            normed, residual = layer.finish(attended, residual, model.norm_after(number))
        logits = model.logits(normed)[: len(rows)].cpu().numpy()
        return [
            best_token(own) if row.takes_best else np.ascontiguousarray(own)
            for row, own in zip(rows, logits, strict=True)
        ]

    def _attend(
        self,
        number: int,
        layer: Layer,
        normed: Tensor,
        rows: Sequence[StepRow],
        tables: Sequence[Sequence[int]],
        positions: Tensor,
    ) -> Tensor:
        """Write the new K and V, and attend: [max_batch, heads, d], zero beyond the batch."""
        q, k, v = layer.project(normed)
        rotary = self._model.positions
        count = len(rows)
        queries = rotary.queries(q[:count], positions)
        self._write(number, k[:count], v[:count], rows, positions)
        attended = torch.zeros_like(q)
        for index, (row, table) in enumerate(zip(rows, tables, strict=True)):
            one = slice(index, index + 1)
            attended[one] = dual_chunk.decode_attention(
                queries.rows(one),
                self._pool.memory[number],
                table,
                row.length + 1,
                rotary.stride,
                rotary.softmax_scale(row.length + 1),
                self._pool.layer_scales(number),
            )
        return attended

    def _write(
        self, number: int, k: Tensor, v: Tensor, rows: Sequence[StepRow], positions: Tensor
    ) -> None:
        """Put each row's new K and V, [n, kv_heads, d] and not rotated, into its page."""
        memory, scales = self._pool.memory[number], self._pool.layer_scales(number)
        rotation = self._model.positions.key_rotation(positions)
        if scales is not None:
            slots = torch.tensor([row.slot for row in rows], device=k.device)
            quantized.append_tokens(memory, scales, slots, k, v, rotation)
            return
        keys = rotation.apply(k)
        for index, row in enumerate(rows):
            one = slice(index, index + 1)
            write_pages(memory, row.table.pages, row.length, keys[one], v[one])
