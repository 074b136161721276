"""What changes from step to step of launches that stay: its inputs, on the host and on the device.

All of them lie in one tensor, so that one copy brings a whole step's.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.dual_chunk.decode_plan import DecodePlan
from ...kernels.dual_chunk.ragged_plan import RaggedPlan, RaggedShape
from ...kernels.page_size import pages_for
from ..milestones import Milestone
from .step import PromptLimits, PromptPiece, StepRow


@dataclass(frozen=True)
class StepShape:
    """How many rows launches are made for: of sequences first, then of prompts within limits.

    `programs` are those of each KV head in the sequences' attention.
    """

    rows: int
    prompt_rows: int
    limits: PromptLimits
    programs: int
    stride: int | None

    def holds(self, rows: int, prompt_rows: int) -> bool:
        """Whether so many fit; launches without prompts serve steps without them."""
        enough = rows <= self.rows and prompt_rows <= self.prompt_rows
        return enough and bool(prompt_rows) == bool(self.prompt_rows)

    @property
    def total(self) -> int:
        """Rows that go through the model."""
        return self.rows + self.prompt_rows

    @property
    def outcomes(self) -> int:
        """Rows that logits are computed for: of every sequence, and at the ends of prompts."""
        return self.rows + (self.limits.pieces if self.prompt_rows else 0)

    @property
    def prompts(self) -> RaggedShape | None:
        """What the prompts' rows need in attention."""
        if not self.prompt_rows:
            return None
        pieces = self.limits.pieces
        pages = pieces * pages_for(self.limits.longest)
        return RaggedShape(self.prompt_rows, pieces, pages, self.stride)

    @property
    def sizes(self) -> list[int]:
        """Numbers of the inputs' parts, in their order; the wide ones first."""
        decode = DecodePlan.size(self.rows, self.programs) if self.rows else 0
        ragged = 0 if self.prompts is None else self.prompts.size
        wide = [*[2 * self.total] * 3, 2 * self.outcomes, 2 * self.rows]
        return [*wide, self.rows, decode, ragged]


@dataclass(frozen=True)
class StepInputs:
    """Views of one int32 tensor."""

    storage: Tensor
    tokens: Tensor  # int64 [total]
    positions: Tensor  # int64 [total]
    slots: Tensor  # int64 [total]: page * 128 + offset; -1 for a row that is not used
    wanted: Tensor  # int64 [outcomes]: the rows that logits are computed for
    follows: Tensor  # int64 [rows]: which outcome of the step before is the token; -1: none
    scales: Tensor  # float32 [rows]
    plan: DecodePlan | None  # where there are rows of sequences
    prompts: RaggedPlan | None  # where there are rows of prompts

    @classmethod
    def over(cls, storage: Tensor, shape: StepShape) -> "StepInputs":
        """In a tensor of so many numbers; no row is used."""
        *wide, scales, decode, ragged = storage.split(shape.sizes)
        tokens, positions, slots, wanted, follows = (each.view(torch.int64) for each in wide)
        slots.fill_(-1)
        follows.fill_(-1)
        plan = DecodePlan.over(decode, shape.rows, shape.programs) if shape.rows else None
        prompts = None if shape.prompts is None else RaggedPlan.over(ragged, shape.prompts)
        scales = scales.view(torch.float32)
        return cls(storage, tokens, positions, slots, wanted, follows, scales, plan, prompts)


class StepBatch:
    """The inputs of steps of one shape, on the host and on the device."""

    def __init__(self, shape: StepShape, device: torch.device) -> None:
        self.shape = shape
        size = sum(shape.sizes)
        on_device = torch.zeros(size, dtype=torch.int32, device=device)
        self.inputs = StepInputs.over(on_device, shape)
        self._host = StepInputs.over(host_memory(device, size, dtype=torch.int32), shape)
        self._host.wanted[: shape.rows] = torch.arange(shape.rows)
        self._planned: list[int] = []
        self._read = Milestone.after_what_is_launched(device)

    def fill(
        self,
        rows: Sequence[StepRow],
        scales: list[float],
        pieces: Sequence[PromptPiece] = (),
        piece_scales: Sequence[float] = (),
    ) -> None:
        """Put rows in their places, when the device has read what was there before.

        Args:
            scales: what logits are multiplied by, of each row; `piece_scales` of each piece.
        """
        self._read.wait()
        host, count = self._host, len(rows)
        tokens, positions, slots, follows = (
            each.numpy() for each in (host.tokens, host.positions, host.slots, host.follows)
        )
        tokens[:count] = [row.token for row in rows]
        positions[:count] = [row.length for row in rows]
        slots[:count] = [row.slot for row in rows]
        slots[count:] = -1
        follows[:count] = [-1 if row.follows is None else row.follows for row in rows]
        host.scales.numpy()[:count] = scales
        if host.plan is not None:
            self._plan(host.plan, [row.length + 1 for row in rows])
        if host.prompts is not None:
            self._fill_pieces(pieces)
            parts = [p.rows(scale) for p, scale in zip(pieces, piece_scales, strict=True)]
            host.prompts.refresh(parts)
        self.inputs.storage.copy_(host.storage, non_blocking=True)
        self._read = Milestone.after_what_is_launched(self.inputs.storage.device)

    def _fill_pieces(self, pieces: Sequence[PromptPiece]) -> None:
        host, first, ending = self._host, self.shape.rows, self.shape.rows
        for piece in pieces:
            own = slice(first, first + piece.count)
            host.tokens.numpy()[own] = piece.tokens
            host.positions.numpy()[own] = piece.positions
            host.slots.numpy()[own] = piece.slots
            first = own.stop
            if piece.ends:
                host.wanted[ending] = first - 1
                ending += 1

    def _plan(self, plan: DecodePlan, lengths: list[int]) -> None:
        """Between page borders only lengths change, and planning takes longer than the rest."""
        pages = [pages_for(length) for length in lengths]
        if pages == self._planned:
            plan.lengths.numpy()[: len(lengths)] = lengths
        else:
            plan.refresh(lengths)
            self._planned = pages


def host_memory(device: torch.device, *shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the host; pinned for a GPU, so that copies do not wait."""
    return torch.zeros(shape, dtype=dtype, pin_memory=device.type == "cuda")
