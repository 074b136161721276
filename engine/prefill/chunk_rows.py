"""Which rows of a chunk a rank computes."""

from dataclasses import dataclass

from torch import Tensor

from ...kernels.dual_chunk import BLOCK_ROWS, QueryBlocks
from ...kernels.page_size import pages_for
from ...kernels.transfer import without_waiting
from ..model.positions import Rotations
from ..model.qwen2 import Qwen2
from ..model.rows import RowSteps


@dataclass(frozen=True, eq=False)
class ChunkRows:
    """The rows of chunk [start, end) of a prompt of `length` tokens that this rank computes.

    `positions` are int64 [n] on the host; `rotations` are theirs.
    """

    start: int
    end: int
    length: int
    blocks: QueryBlocks
    positions: Tensor
    rotations: Rotations
    steps: RowSteps

    @classmethod
    def of(cls, model: Qwen2, start: int, end: int, length: int) -> "ChunkRows":
        """Those of the blocks that fall to this rank."""
        every, mesh = range(start // BLOCK_ROWS, pages_for(end)), model.mesh
        own = tuple(b for b in every if b % mesh.sequence_parallel == mesh.sequence_rank)
        blocks = QueryBlocks(own, end)
        positions = blocks.positions()
        rotations = model.positions.rotations(
            without_waiting(positions, model.device), range(start, end)
        )
        steps = RowSteps.of(len(positions), model.device)
        return cls(start, end, length, blocks, positions, rotations, steps)

    @property
    def hold_last(self) -> bool:
        """Whether the prompt's last row is among them."""
        return bool(len(self.positions)) and int(self.positions[-1]) == self.length - 1
