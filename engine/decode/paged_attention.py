"""Attention of a decode step's rows, all at once, by kernels over inputs that stay in place."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import elementwise, quantized
from ...kernels.dual_chunk.decode_plan import DecodePlan
from ...kernels.dual_chunk.ragged_plan import RaggedPlan
from ...kernels.dual_chunk.segments import Rotation, SegmentQueries
from ...kernels.dual_chunk.triton_decode import decode_attention
from ...kernels.dual_chunk.triton_ragged import ragged_attention
from ...kernels.narrow import Rows
from ..kv.pages import PagePool
from ..model.layer import Attention, Layer
from ..model.positions import RotaryPositions, Rotations
from .graph_inputs import StepInputs


@dataclass(frozen=True)
class StepQueries:
    """Rotated queries of one layer: the sequences', and those of the prompts' rows."""

    sequences: SegmentQueries | None
    prompts: SegmentQueries | None


@dataclass(frozen=True, eq=False)
class StepRotations:
    """What the rows of a step are rotated by: keys all together, queries by what they may see."""

    keys: Rotation
    sequences: Rotations | None
    prompts: Rotations | None

    @classmethod
    def of(
        cls, positions: RotaryPositions, inputs: StepInputs, longest_prompt: int
    ) -> "StepRotations":
        """Those of a step's inputs; no row of a prompt is at `longest_prompt` or beyond."""
        rows = len(inputs.scales)
        sequences = prompts = None
        if inputs.plan is not None:
            sequences = positions.rotations(inputs.positions[:rows])
        if inputs.prompts is not None:
            prompts = positions.rotations(inputs.positions[rows:], range(longest_prompt))
        if sequences is None or prompts is None:
            only = sequences or prompts
            assert only is not None
            return cls(only.intra, sequences, prompts)
        keys = Rotation(
            torch.cat((sequences.intra.cosine, prompts.intra.cosine)),
            torch.cat((sequences.intra.sine, prompts.intra.sine)),
        )
        return cls(keys, sequences, prompts)


@dataclass(frozen=True, eq=False)
class PagedAttention(Attention[StepQueries]):
    """Of sequences' newest tokens and of pieces of prompts; zero for a row that is not used."""

    pool: PagePool
    tables: Tensor  # int32 [rows, pages]: of the sequences
    inputs: StepInputs
    stride: int | None
    rotations: StepRotations

    def write(self, layer: Layer, normed: Rows) -> StepQueries:
        q, k, v = layer.project(normed)
        self._write_pages(layer, k, v)
        rows, rotations = len(self.inputs.scales), self.rotations
        return StepQueries(
            None if rotations.sequences is None else rotations.sequences.rotate(q[:rows]),
            None if rotations.prompts is None else rotations.prompts.rotate(q[rows:]),
        )

    def attend(self, layer: Layer, queries: StepQueries) -> Tensor:
        inputs, parts = self.inputs, []
        if queries.sequences is not None and inputs.plan is not None:
            parts.append(self._attend_sequences(layer, queries.sequences, inputs.plan))
        if queries.prompts is not None and inputs.prompts is not None:
            parts.append(self._attend_prompts(layer, queries.prompts, inputs.prompts))
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _write_pages(self, layer: Layer, k: Tensor, v: Tensor) -> None:
        memory, scales = self._pages(layer)
        slots, keys = self.inputs.slots, self.rotations.keys
        if scales is None:
            elementwise.write_pages(memory, slots, k, v, keys)
            return
        rows, prompts = len(self.inputs.scales), self.inputs.prompts
        if rows:
            # Tokens are put behind others, into pages that have their scales.
            own = Rotation(keys.cosine[:rows], keys.sine[:rows])
            quantized.append_tokens(memory, scales, slots[:rows], k[:rows], v[:rows], own)
        if prompts is not None:
            # Prompts are written from a page's beginning on.
            own = Rotation(keys.cosine[rows:], keys.sine[rows:])
            quantized.narrow_blocks(memory, scales, prompts.blocks, k[rows:], v[rows:], own)

    def _attend_sequences(self, layer: Layer, queries: SegmentQueries, plan: DecodePlan) -> Tensor:
        memory, scales = self._pages(layer)
        attended, _ = decode_attention(
            queries, memory, self.tables, plan, self.stride, self.inputs.scales, page_scales=scales
        )
        return attended

    def _attend_prompts(self, layer: Layer, queries: SegmentQueries, plan: RaggedPlan) -> Tensor:
        memory, scales = self._pages(layer)
        return ragged_attention(queries, memory, plan, scales)

    def _pages(self, layer: Layer) -> tuple[Tensor, Tensor | None]:
        return self.pool.memory[layer.number], self.pool.layer_scales(layer.number)
