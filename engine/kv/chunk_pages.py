"""Where K and V of one prefill chunk go: into the pool, by way of all sequence ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels import elementwise, quantized
from ...kernels.dual_chunk.segments import Rotation
from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.transfer import without_waiting
from ..parallel.mesh import Mesh
from .pages import HeldPages, PagePool, Pages, page_index


class ChunkPages:
    """The pages of blocks [first_block, first_block + len(pages)) of a prompt, in every layer.

    One rank alone writes into the pool at once. Several write their own blocks into a buffer, and
    gather all of them. The rest of a prompt's last page is zeros.

    Pages of 8 bits are written whole, so rows begin where a page does.
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
        self._places = without_waiting(torch.from_numpy(places), device)
        slots = (places[:, None] * PAGE_TOKENS + np.arange(PAGE_TOKENS)).ravel()[:num_rows]
        self._slots = without_waiting(torch.from_numpy(slots), device)
        if ranks == 1 and num_rows % PAGE_TOKENS and not pool.geometry.quantized:
            pool.memory[:, pages[-1]].zero_()
        self._buffer: Pages | None = None
        if ranks > 1:
            most = -(-len(table) // ranks)
            scales = pool.scales
            self._buffer = Pages(
                pool.memory.new_zeros(most, *pool.memory.shape[2:]),
                None if scales is None else scales.new_ones(most, *scales.shape[2:]),
            )
            blocks = np.arange(len(table))
            # Block b of the prompt is rank b % ranks's, and that rank's first is its place 0.
            order = (first_block + blocks) % ranks * most + blocks // ranks
            self._order = without_waiting(torch.from_numpy(order), device)
            self._targets = without_waiting(torch.from_numpy(table), device)
        self._first_block = first_block
        self._part = _part_of(mesh, len(table))
        self._shared_pages = table[self._part]
        self._shared_index = page_index(self._shared_pages, device)

    def write(self, layer: int, rows: slice, k: Tensor, v: Tensor, rotation: Rotation) -> None:
        """Rotate K of some of this rank's rows, and write K and V, each [n, kv_heads, d]."""
        target = self._pool.layer(layer) if self._buffer is None else self._buffer
        if target.scales is None:
            elementwise.write_pages(target.values, self._slots[rows], k, v, rotation)
        else:
            pages = self._places[rows.start // PAGE_TOKENS : pages_for(rows.stop)]
            quantized.narrow_pages(target.values, target.scales, pages, k, v, rotation)

    def gather(self, layer: int) -> None:
        """Put what all ranks wrote into this rank's pool; collective where there are several."""
        if self._buffer is None:
            return
        # Collectives do not take every 8-bit type: bits are moved.
        values = self._gathered(self._buffer.bits).view(self._buffer.values.dtype)
        scales = self._buffer.scales
        pages = Pages(values, None if scales is None else self._gathered(scales))
        self._pool.put(layer, self._targets, 0, pages)

    def _gathered(self, own: Tensor) -> Tensor:
        """What all ranks have of something, in the prompt's order."""
        return self._mesh.gather_over_sequence_ranks(own).flatten(0, 1)[self._order]

    def part(self, layer: int) -> tuple[int, HeldPages] | None:
        """The contiguous part that this rank hands off: its first page in the prompt, and pages.

        None where there are fewer pages than ranks, and none is left for this one.
        """
        if self._part.start == self._part.stop:
            return None
        pages = HeldPages(self._pool.layer(layer), self._shared_pages, self._shared_index)
        return self._first_block + self._part.start, pages


def _part_of(mesh: Mesh, count: int) -> slice:
    ranks, rank = mesh.sequence_parallel, mesh.sequence_rank
    return slice(count * rank // ranks, count * (rank + 1) // ranks)
