"""A small engine in the manner of vLLM's: steps of several sequences, over pages of its shape."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from longreach.engine.json_files import read_json
from longreach.engine.model.layer import Attention, Layer
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels.narrow import Rows
from longreach.plugins.vllm.decode_rows import DecodeInputs, DecodeRows, PortableDecodeRows
from longreach.plugins.vllm.model_attention import DUAL_CHUNK_KEY, ModelAttention
from longreach.plugins.vllm.piece_attention import PieceAttention, table_of
from longreach.plugins.vllm.step_attention import StepAttention
from longreach.plugins.vllm.step_plan import StepPlan

CPU = torch.device("cpu")


def raw_config(folder: Path) -> dict:
    """A checkpoint's `config.json` with its budgets in it, as vLLM puts them there."""
    raw = read_json(folder / "config.json")
    budgets = folder / "sparse_attention_config.json"
    if budgets.exists():
        raw[DUAL_CHUNK_KEY]["sparse_attention_config"] = read_json(budgets)
    return raw


@dataclass
class Request:
    """Tokens of one request: its prompt and, one a step, what follows it."""

    tokens: list[int]
    prompt: int
    done: int = 0
    logits: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Projected(Attention[tuple[Tensor, Tensor, Tensor]]):
    """Hands what vLLM's models hand to their attention: projected, not rotated."""

    step: StepAttention
    caches: Sequence[Tensor]

    def write(self, layer: Layer, normed: Rows) -> tuple[Tensor, Tensor, Tensor]:
        return layer.project(normed)

    def attend(self, layer: Layer, queries: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        q, k, v = queries
        output = torch.full(q.shape, torch.nan, dtype=q.dtype, device=q.device)
        self.step.attend(layer.number, q, k, v, self.caches[layer.number], output)
        return output


class Engine:
    """A checkpoint, and pages for some sequences that lie in an order of their own."""

    def __init__(
        self,
        folder: Path,
        sequences: Sequence[Request],
        most: int,
        device: torch.device = CPU,
        dtype: torch.dtype = torch.float32,
        programs: int | None = None,
    ) -> None:
        """`programs` of each KV head, for decodes by the kernel; None for the portable way."""
        self._device = device
        self._model = Qwen2.load(folder, Mesh.single(), dtype, device)
        config = self._model.config
        self.attention = ModelAttention.of(
            raw_config(folder), config.num_heads, config.num_kv_heads, 0
        )
        self._sequences = sequences
        pages = -(-most // 128)
        shape = (pages * len(sequences) + 1, config.num_kv_heads, 2, 128, config.head_dim)
        self._caches = [
            torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in self._model.layers
        ]
        self._inputs = None
        if programs is not None:
            self._inputs = DecodeInputs(self.attention, len(sequences), programs, device)
        numbers = np.random.default_rng(0).permutation(np.arange(1, shape[0]))
        tables = torch.from_numpy(numbers.astype(np.int32)).view(len(sequences), pages)
        self._tables = tables.to(device)

    @torch.inference_mode()
    def step(self, scheduled: dict[int, int]) -> None:
        """Compute the next so many tokens of some sequences, in the order given."""
        own = [self._sequences[number] for number in scheduled]
        counts = list(scheduled.values())
        ends = np.array([each.done + n for each, n in zip(own, counts, strict=True)])
        plan = StepPlan.of(
            np.concatenate(([0], np.cumsum(counts))), ends, np.array([each.prompt for each in own])
        )
        tables = self._tables[list(scheduled)]
        where = [np.arange(end - n, end) for end, n in zip(ends, counts, strict=True)]
        positions = torch.from_numpy(np.concatenate(where)).to(self._device)
        slots = torch.cat(
            [
                table[each // 128].long() * 128 + torch.from_numpy(each % 128)
                for table, each in zip(tables.cpu(), where, strict=True)
            ]
        ).to(self._device)
        pieces = [
            PieceAttention(
                self.attention, each, table_of(tables, each.sequence), positions[each.rows]
            )
            for each in plan.pieces
        ]
        decodes = self._decodes(plan, tables) if plan.ends else None
        step = StepAttention(self.attention, plan.rows, positions, slots, decodes, pieces)
        tokens = [
            t
            for each, end, n in zip(own, ends, counts, strict=True)
            for t in each.tokens[end - n : end]
        ]
        hidden = self._model.begin(torch.tensor(tokens, device=self._device))
        for layer in self._model.layers:
            layer.forward(hidden, _Projected(step, self._caches))
        logits = self._model.logits(hidden[0]).float().cpu().split(counts)
        for each, n, rows in zip(own, counts, logits, strict=True):
            each.done += n
            each.logits.append(rows)

    def _decodes(self, plan: StepPlan, tables: Tensor) -> DecodeRows:
        if self._inputs is None:
            return PortableDecodeRows(self.attention, plan, tables)
        return self._inputs.fill(plan, tables)

    def run(self, steps: Sequence[dict[int, int]]) -> list[Tensor]:
        """Logits of all rows of each sequence."""
        for scheduled in steps:
            self.step(scheduled)
        return [torch.cat(each.logits) for each in self._sequences]
