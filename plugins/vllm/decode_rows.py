"""The rows of a step that are the newest token of a sequence each, and their attention.

On a GPU everything that changes from step to step lies at addresses that stay, so that a CUDA graph
may hold the launches.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...kernels import dual_chunk
from ...kernels.dual_chunk import SegmentQueries
from ...kernels.dual_chunk.decode_plan import DecodePlan
from ...kernels.page_size import PAGE_TOKENS
from .model_attention import ModelAttention
from .step_plan import StepPlan


class DecodeRows(Protocol):
    """As many rows as `count`, one sequence each; the rows that are not used come out as 0."""

    @property
    def count(self) -> int:
        """Rows, those that are not used included."""
        ...

    def attend(self, queries: SegmentQueries, memory: Tensor) -> Tensor:
        """Attention over each row's own pages, [count, heads, d].

        Args:
            queries: rotated, each [count, heads, d].
            memory: one layer's pages, [pages, kv_heads, 2, 128, d].
        """
        ...


@dataclass(frozen=True, eq=False)
class PortableDecodeRows:
    """On any device, one row after the other."""

    model: ModelAttention
    plan: StepPlan
    tables: Tensor  # int32 [count or more, pages]

    @property
    def count(self) -> int:
        """As `DecodeRows.count`."""
        return len(self.plan.ends)

    def attend(self, queries: SegmentQueries, memory: Tensor) -> Tensor:
        """As `DecodeRows.attend`."""
        output = torch.zeros_like(queries.intra)
        positions = self.model.positions
        for row, (end, length) in enumerate(zip(self.plan.ends, self.plan.lengths, strict=True)):
            if end:
                one = slice(row, row + 1)
                table = self.tables[row, : -(-end // PAGE_TOKENS)].tolist()
                output[one] = dual_chunk.decode_attention(
                    queries.rows(one), memory, table, end, positions.stride,
                    positions.softmax_scale(length),
                )  # fmt: skip
        return output


@dataclass(frozen=True, eq=False)
class GraphDecodeRows:
    """On a GPU, all rows in one launch over inputs that stay in place."""

    stride: int | None
    plan: DecodePlan
    scales: Tensor  # float32 [count]
    tables: Tensor  # int32 [count or more, pages]

    @property
    def count(self) -> int:
        """As `DecodeRows.count`."""
        return len(self.scales)

    def attend(self, queries: SegmentQueries, memory: Tensor) -> Tensor:
        """As `DecodeRows.attend`."""
        from ...kernels.dual_chunk.triton_decode import decode_attention

        tables = self.tables[: self.count]
        return decode_attention(queries, memory, tables, self.plan, self.stride, self.scales)[0]


class DecodeInputs:
    """Memory for `GraphDecodeRows` of up to `most` rows; one step's at a time.

    Args:
        programs: of each KV head.
    """

    def __init__(
        self, model: ModelAttention, most: int, programs: int, device: torch.device
    ) -> None:
        self._model, self._programs = model, programs
        size = most + DecodePlan.size(most, programs)
        self._storage = torch.zeros(size, dtype=torch.int32, device=device)
        self._written = np.zeros(0, dtype=np.int32)
        self._planned: list[int] = []

    def fill(self, plan: StepPlan, tables: Tensor) -> GraphDecodeRows:
        """Bring a step's numbers to the device; does not wait for it.

        Args:
            tables: int32 [rows or more, pages], whose address stays.
        """
        count = len(plan.ends)
        size = count + DecodePlan.size(count, self._programs)
        on_host = self._on_host(plan, count, size)
        own = self._storage[:size]
        # From memory that is not pinned: what is written there next has no say any more.
        own.copy_(torch.from_numpy(on_host), non_blocking=True)
        return GraphDecodeRows(
            self._model.stride,
            DecodePlan.over(own[count:], count, self._programs),
            own[:count].view(torch.float32),
            tables,
        )

    def _on_host(self, plan: StepPlan, count: int, size: int) -> np.ndarray:
        """Scales and plan. Between borders of pages only lengths and scales change."""
        pages = [-(-end // PAGE_TOKENS) for end in plan.ends]
        if len(self._written) != size or pages != self._planned:
            self._written = np.zeros(size, dtype=np.int32)
            storage = torch.from_numpy(self._written[count:])
            DecodePlan.over(storage, count, self._programs).refresh(plan.ends)
            self._planned = pages
        scale = self._model.positions.softmax_scale
        self._written[:count].view(np.float32)[:] = [scale(length) for length in plan.lengths]
        self._written[count : 2 * count] = plan.ends
        return self._written
