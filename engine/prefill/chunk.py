"""One chunk of one prompt on one rank: from its tokens to KV pages, and to logits at the end."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...kernels.narrow import Rows
from ...kernels.pages import BlockTable
from ...kernels.transfer import without_waiting
from ..kv.hand_off import HandOff
from ..messages import Tokens
from ..stages import Stages
from .attention import ChunkAttention, ChunkRows, LastRowAttention, PrefillParts


@dataclass(frozen=True)
class ChunkResult:
    """What came out of one chunk.

    `logits` are those after the prompt's last token, float32 [vocab] on every rank, once the chunk
    reaches the prompt's end, else None.
    """

    logits: Tensor | None
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
) -> ChunkResult:
    """Compute prompt tokens [start, end), whose earlier ones lie in the pages; collective.

    Args:
        table: of the whole prompt.
        hand_off: takes each layer's finished pages.
    """
    stages = Stages.on(parts.model.device)
    rows = ChunkRows.of(parts.model, start, end, len(prompt))
    attention = ChunkAttention(parts, rows, table, hand_off, stages)
    tokens = torch.from_numpy(prompt[rows.positions.numpy()])
    chunk = _Chunk(parts, rows, attention, stages)
    return ChunkResult(chunk.run(without_waiting(tokens, parts.model.device)), stages)


@dataclass(frozen=True, eq=False)
class _Chunk:
    """This rank's rows on their way through the layers."""

    parts: PrefillParts
    rows: ChunkRows
    attention: ChunkAttention
    stages: Stages

    def run(self, tokens: Tensor) -> Tensor | None:
        """Logits [vocab] after the prompt's last token, None before its end."""
        model = self.parts.model
        hidden = model.begin(tokens, self.stages)
        for layer in model.layers[:-1]:
            layer.forward(hidden, self.attention, self.rows.steps, self.stages)
        return self._run_last_layer(*hidden)

    def _run_last_layer(self, normed: Rows, residual: Rows) -> Tensor | None:
        """Of the last layer only K and V are wanted, and the prompt's last row."""
        model, rows = self.parts.model, self.rows
        self.attention.write_keys_values(model.layers[-1], normed)
        if rows.end < rows.length:
            return None
        logits = torch.zeros(model.config.vocab_size, device=model.device)
        if rows.hold_last:
            logits = self._last_logits([normed[-1:], residual[-1:]])
        with self.stages.time("communication"):
            return model.mesh.sum_over_sequence_ranks(logits)

    def _last_logits(self, hidden: list[Rows]) -> Tensor:
        """Logits float32 [vocab] of one row, whose hidden states are [1, hidden]."""
        model = self.parts.model
        attention = LastRowAttention(self.attention, self.stages)
        model.layers[-1].forward(hidden, attention, stages=self.stages)
        with self.stages.time("linear"):
            return model.logits(hidden[0])[0].float()
