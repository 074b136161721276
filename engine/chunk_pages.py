"""Where K and V of one prefill chunk go: into the pool, by way of all sequence ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ..kernels import elementwise
from ..kernels.dual_chunk.segments import Rotation
from ..kernels.transfer import without_waiting
from .mesh import Mesh
from .pages import PAGE_TOKENS, PagePool, consecutive_runs


class ChunkPages:
    """The pages of blocks [first_block, first_block + len(pages)) of a prompt, in every layer.

    One rank alone writes into the pool at once. Several write their own blocks into a buffer, and
    gather all of them. The rest of a prompt's last page is zeros.
    """

    def __init__(
        self,
        pool: PagePool,
        mesh: Mesh,
        pages: Sequence[int],
        first_block: int,
        own_blocks: Sequence[int],
        num_rows: int,
    ) -> None:
        """`own_blocks` of the prompt are this rank's, `num_rows` rows in all."""
        self._pool, self._mesh = pool, mesh
        ranks = mesh.sequence_parallel
        device = pool.memory.device
        own = np.asarray(own_blocks, dtype=np.int64) - first_block
        table = np.asarray(pages, dtype=np.int64)
        # Own blocks lie one after another in the buffer, at their pages in the pool.
        places = table[own] if ranks == 1 else np.arange(len(own))
        slots = (places[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()[:num_rows]
        self._slots = without_waiting(torch.from_numpy(slots), device)
        if ranks == 1 and num_rows % PAGE_TOKENS:
            pool.memory[:, pages[-1]].zero_()
        self._buffer: Tensor | None = None
        if ranks > 1:
            most = -(-len(table) // ranks)
            self._buffer = pool.memory.new_zeros(most, *pool.memory.shape[2:])
            blocks = np.arange(len(table))
            # Block b of the prompt is rank b % ranks's, and that rank's first is its place 0.
            order = (first_block + blocks) % ranks * most + blocks // ranks
            self._order = without_waiting(torch.from_numpy(order), device)
            self._targets = without_waiting(torch.from_numpy(table), device)
        self._first_block = first_block
        self._share = _share_of(mesh, len(table))
        self._shared_pages = _index(table[self._share], device)

    def write(self, layer: int, rows: slice, k: Tensor, v: Tensor, rotation: Rotation) -> None:
        """Rotate K of some of this rank's rows, and write K and V, each [n, kv_heads, d]."""
        memory = self._pool.memory[layer] if self._buffer is None else self._buffer
        elementwise.write_pages(memory, self._slots[rows], k, v, rotation)

    def gather(self, layer: int) -> None:
        """Put what all ranks wrote into this rank's pool; collective where there are several."""
        if self._buffer is None:
            return
        gathered = self._mesh.gather_over_sequence_ranks(self._buffer).flatten(0, 1)
        self._pool.memory[layer].index_copy_(0, self._targets, gathered[self._order])

    def share(self, layer: int) -> tuple[int, Tensor] | None:
        """The contiguous part that this rank hands off: its first page in the prompt, and pages.

        [n, kv_heads, 2, 128, d], a view where they are neighbours in the pool; None where there
        are fewer pages than ranks, and none is left for this one.
        """
        if self._share.start == self._share.stop:
            return None
        pages = self._pool.memory[layer][self._shared_pages]
        return self._first_block + self._share.start, pages


def _share_of(mesh: Mesh, count: int) -> slice:
    ranks, rank = mesh.sequence_parallel, mesh.sequence_rank
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def _index(pages: np.ndarray, device: torch.device) -> slice | Tensor:
    """What picks pages out of memory: a slice where they are neighbours."""
    runs = consecutive_runs(pages.tolist())
    if len(runs) == 1:
        return slice(runs[0][1], runs[0][1] + runs[0][2])
    return without_waiting(torch.from_numpy(pages), device)
