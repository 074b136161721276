"""One chunk of one prompt on one rank: from its tokens to KV pages, and to logits at the end."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ...kernels.narrow import Rows
from ...kernels.pages import BlockTable
from ...kernels.transfer import without_waiting
from ..kv.hand_off import HandOff
from ..messages import Tokens
from ..milestones import Milestone
from ..model.rows import RowSteps
from ..stages import Stages
from .attention import AttendedAlready, ChunkAttention, PrefillParts
from .chunk_rows import ChunkRows
from .scores import score_rows, score_width


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk.

    `logits` are those after the prompt's last token, float32 [vocab] on every rank, once the chunk
    reaches the prompt's end, else None. `scores`, on every rank, are those of the tokens that
    follow the chunk's own, [tokens, columns], where they were asked for; the last row of a prompt's
    last chunk means nothing. `nearly`: when a few whole layers are to go.
    """

    logits: Tensor | None
    scores: Tensor | None
    nearly: Milestone
    _stages: Stages

    @cached_property
    def stages(self) -> dict[str, float]:
        """Seconds by what they were spent on; on a GPU, returns when the chunk is computed.

        Keys: linear, attention, selection, elementwise, page writes, communication, hand-off. A
        chunk's time that is in none of them went to launches and the host.
        """
        return self._stages.seconds()


def run_chunk(
    parts: PrefillParts,
    prompt: Tokens,
    table: BlockTable,
    start: int,
    end: int,
    hand_off: HandOff | None,
    layers_to_go: int,
    score_top: int | None,
) -> ChunkResult:
    """Compute prompt tokens [start, end), whose earlier ones lie in the pages; collective.

    Args:
        table: of the whole prompt.
        hand_off: takes each layer's finished pages.
        layers_to_go: before how many whole layers the chunk is nearly computed. The last is none of
            them: K and V are nearly all that is computed of it.
        score_top: score the prompt's own tokens, with so many alternatives.
    """
    stages = Stages.on(parts.model.device)
    rows = ChunkRows.of(parts.model, start, end, len(prompt))
    attention = ChunkAttention(parts, rows, table, hand_off, stages)
    tokens = torch.from_numpy(prompt[rows.positions.numpy()])
    following = None
    if score_top is not None:
        padded = torch.from_numpy(np.append(prompt, np.int32(0))).long()
        following = padded[rows.positions + 1].to(parts.model.device)
    chunk = _Chunk(parts, rows, attention, stages, following, score_top or 0)
    return chunk.run(without_waiting(tokens, parts.model.device), layers_to_go)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """This rank's rows on their way through the layers."""

    parts: PrefillParts
    rows: ChunkRows
    attention: ChunkAttention
    stages: Stages
    following: Tensor | None
    score_top: int

    def run(self, tokens: Tensor, layers_to_go: int) -> ChunkResult:
        """Through all layers; see `run_chunk`."""
        model = self.parts.model
        hidden = model.begin(tokens, self.stages)
        turns, nearly = self._turns(), None
        for layer in model.layers[:-1]:
            if nearly is None and layer.number >= len(model.layers) - 1 - layers_to_go:
                nearly = Milestone.after_what_is_launched(model.device)
            layer.forward(hidden, self.attention, turns, self.stages)
        nearly = nearly or Milestone.after_what_is_launched(model.device)
        if self.following is None:
            return ChunkResult(self._run_last_layer(*hidden), None, nearly, self.stages)
        logits, scores = self._score(hidden, turns, self.following)
        return ChunkResult(logits, scores, nearly, self.stages)

    def _score(
        self, hidden: list[Rows], turns: RowSteps, following: Tensor
    ) -> tuple[Tensor | None, Tensor]:
        """Logits as `_run_last_layer`, and scores; of the last layer all rows are wanted here."""
        model, rows = self.parts.model, self.rows
        model.layers[-1].forward(hidden, self.attention, turns, self.stages)
        columns = score_width(self.score_top)
        scores = torch.zeros(rows.end - rows.start, columns, device=model.device)
        with self.stages.time("linear"):
            own = (rows.positions - rows.start).to(model.device)
            scores[own] = score_rows(model, hidden[0], following, self.score_top)
        logits = None
        if rows.end == rows.length:
            logits = torch.zeros(model.config.vocab_size, device=model.device)
            if rows.hold_last:
                logits = model.logits(hidden[0][-1:])[0].float()
        with self.stages.time("communication"):
            if logits is not None:
                model.mesh.sum_over_sequence_ranks(logits)
            return logits, model.mesh.sum_over_sequence_ranks(scores)

    def _turns(self) -> RowSteps:
        """How rows go through a layer's second half: where ranks wait for sums, in turns."""
        if self.parts.model.mesh.tensor_parallel == 1:
            return self.rows.steps
        return RowSteps.in_turns(len(self.rows.positions), self.parts.model.device)

    def _run_last_layer(self, normed: Rows, residual: Rows) -> Tensor | None:
        """Logits [vocab] after the prompt's last token, None before its end.

        Of the last layer only K and V are wanted, and the prompt's last row.
        """
        model, rows = self.parts.model, self.rows
        self.attention.write_keys_values(model.layers[-1], normed)
        if rows.end < rows.length:
            return None
        attended = self.attention.attend_last(model.layers[-1], normed)
        logits = torch.zeros(model.config.vocab_size, device=model.device)
        if rows.hold_last:
            logits = self._last_logits(attended, [normed[-1:], residual[-1:]])
        with self.stages.time("communication"):
            return model.mesh.sum_over_sequence_ranks(logits)

    def _last_logits(self, attended: Tensor, hidden: list[Rows]) -> Tensor:
        """Logits float32 [vocab] of one row, [1, heads, d], whose hidden states are [1, hidden]."""
        model = self.parts.model
        model.layers[-1].forward(hidden, AttendedAlready(attended), stages=self.stages)
        with self.stages.time("linear"):
            return model.logits(hidden[0])[0].float()
