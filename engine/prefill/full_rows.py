"""A prompt's last rows, which attend to everything under sparse attention too.

They are few and look at every key: the keys are dealt to the sequence ranks, each of which has the
rows' queries, and what the ranks make of them is merged.
"""

import torch
from torch import Tensor

from ...kernels import dual_chunk
from ...kernels.dual_chunk import (
    BLOCK_ROWS,
    KeyPieces,
    LastRow,
    PartialResults,
    QueryBlocks,
)
from ...kernels.pages import LayerPages
from ...kernels.transfer import without_waiting
from ..model.qwen2 import Qwen2
from ..stages import Stages
from .chunk_rows import ChunkRows

_FULL_ROWS = 128
"""A question mostly stands at the end, and its own rows are those that cannot do without full
attention: see lab/pocket/EXPERIMENTS.md."""


def first_full_block(length: int) -> int:
    """The first block of a prompt of so many tokens whose rows attend to everything."""
    return max(0, (length - _FULL_ROWS) // BLOCK_ROWS)


class EverySequenceRank:
    """Attention of some of a chunk's last rows over all keys up to them, by all sequence ranks.

    Args:
        positions: of the rows, neighbours that end where `blocks` does.
    """

    def __init__(
        self,
        model: Qwen2,
        positions: range,
        blocks: QueryBlocks | LastRow,
        scale: float,
        stages: Stages,
    ) -> None:
        self._mesh, self._stride = model.mesh, model.positions.stride
        self._blocks, self._scale, self._stages = blocks, scale, stages
        where = torch.arange(positions.start, positions.stop, device=model.device)
        self._rotations = model.positions.rotations(where, positions)
        self._pieces = KeyPieces.of(blocks.end)

    def attend(self, queries: Tensor, pages: LayerPages) -> Tensor:
        """Queries [rows, heads, d], not rotated, to the same in full attention; collective."""
        mesh = self._mesh
        own = self._pieces.part(mesh.sequence_rank, mesh.sequence_parallel)
        with self._stages.time("attention"):
            part = dual_chunk.attention_in_pieces(
                self._rotations.rotate(queries), self._blocks, pages, self._stride, self._scale, own
            )
        every = self._exchanged(part)
        with self._stages.time("attention"):
            return every.merged(queries.dtype)

    def _exchanged(self, part: PartialResults) -> PartialResults:
        """All ranks' pieces, in order. Ranks that have one less send one that nobody takes."""
        ranks = self._mesh.sequence_parallel
        if ranks == 1:
            return part
        with self._stages.time("communication"):
            counts = [len(self._pieces.part(rank, ranks)) for rank in range(ranks)]
            head_dim = part.output.shape[-1]
            sent = part.output.new_zeros(max(counts), *part.lse.shape[1:], head_dim + 1)
            sent[: len(part.lse), ..., :head_dim] = part.output
            sent[: len(part.lse), ..., head_dim] = part.lse
            gathered = self._mesh.gather_over_sequence_ranks(sent)
            every = torch.cat([each[:n] for each, n in zip(gathered, counts, strict=True)])
            return PartialResults(every[..., :head_dim], every[..., head_dim])


class FullRows:
    """The rows of a chunk that attend to everything, where a rank holds some of them."""

    def __init__(self, model: Qwen2, rows: ChunkRows, scale: float, stages: Stages) -> None:
        first = max(first_full_block(rows.length), rows.start // BLOCK_ROWS)
        blocks = QueryBlocks(tuple(range(first, -(-rows.end // BLOCK_ROWS))), rows.end)
        self.positions = range(first * BLOCK_ROWS, rows.end)
        self._every = EverySequenceRank(model, self.positions, blocks, scale, stages)
        held = rows.positions - self.positions.start
        self._own = without_waiting(held[held >= 0], model.device)

    def attend(self, queries: Tensor, pages: LayerPages, attended: Tensor) -> None:
        """Fill in those that this rank holds, its last ones; collective.

        Args:
            queries: of all of them, not rotated, [rows, heads, d].
            attended: this rank's rows, [n, heads, d].
        """
        result = self._every.attend(queries, pages)
        if len(self._own):
            attended[len(attended) - len(self._own) :] = result[self._own]

    @staticmethod
    def are_in(rows: ChunkRows) -> bool:
        """Whether the chunk has such rows, on whichever rank."""
        return rows.end > first_full_block(rows.length) * BLOCK_ROWS
