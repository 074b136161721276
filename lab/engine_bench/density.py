"""How much of causal attention sparse attention really computes."""

import torch
from torch import Tensor

from ...engine.prefill.attention import SparseAttention
from ...kernels.dual_chunk import BLOCK_ROWS, QueryBlocks
from ...kernels.transfer import without_waiting


class Density:
    """Watches a prefill and counts the pairs of query and key that its tiles and columns hold.

    Counting stays on the device until `of` is asked.
    """

    def __init__(self, device: torch.device) -> None:
        self._pairs = torch.zeros((), dtype=torch.float64, device=device)
        self._blocks: QueryBlocks | None = None
        self._numbers = torch.empty(0, dtype=torch.int32, device=device)

    def __call__(self, seen: SparseAttention) -> None:
        """Count one layer of one chunk."""
        columns, distances = seen.selections.columns, seen.selections.distances
        blocks = self._block_numbers(seen.blocks).expand(len(columns), -1).contiguous()
        tiles = torch.searchsorted(distances, blocks, right=True).sum()
        early = torch.searchsorted(columns, blocks * BLOCK_ROWS).sum()
        self._pairs += BLOCK_ROWS * (tiles * BLOCK_ROWS + early)

    def of(self, causal_pairs: float) -> float:
        """Pairs counted since the last call, as a share."""
        pairs = float(self._pairs)
        self._pairs.zero_()
        return pairs / causal_pairs

    def _block_numbers(self, blocks: QueryBlocks) -> Tensor:
        if blocks is not self._blocks:
            self._blocks = blocks
            numbers = torch.tensor(blocks.blocks, dtype=torch.int32)
            self._numbers = without_waiting(numbers, self._pairs.device)
        return self._numbers
