"""Where K and V of one prefill chunk go: into the pool, by way of all sequence ranks."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...kernels import elementwise, quantized
from ...kernels.dual_chunk.segments import Rotation
from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.transfer import without_waiting
from ..parallel.aside import Pending
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
            self._buffer = _pages_like(pool, most)
            self._gathered = _pages_like(pool, ranks * most)
            # Block b of the prompt is rank b % ranks's, and that rank's first is its place 0.
            firsts = (np.arange(ranks) - first_block) % ranks
            blocks = firsts[:, None] + np.arange(most) * ranks  # as they are gathered
            exist = blocks < len(table)
            self._targets = without_waiting(torch.from_numpy(table[blocks[exist]]), device)
            # Where ranks have as many blocks each, whatever is gathered is wanted.
            self._wanted: Tensor | None = None
            if not exist.all():
                places = np.flatnonzero(exist.ravel())
                self._wanted = without_waiting(torch.from_numpy(places), device)
        self._first_block = first_block
        self._part = part_of(mesh, len(table))
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

    def begin_gather(self, layer: int) -> Pending[Tensor] | None:
        """Put what all ranks wrote into this rank's pool, beside computing; collective.

        Nothing more is written until that is waited for. None where there is one rank.
        """
        own = self._buffer
        if own is None:
            return None
        if own.scales is not None:
            # Both gathers are on one stream: whoever waits for the second has for the first.
            self._mesh.begin_gather_over_sequence_ranks(own.scales, self._gathered.scales)
        # Collectives do not take every 8-bit type: bits are moved.
        return self._mesh.begin_gather_over_sequence_ranks(
            own.bits, self._gathered.bits, lambda _: self._put(layer)
        )

    def _put(self, layer: int) -> None:
        pages = self._gathered if self._wanted is None else self._gathered.at(self._wanted)
        self._pool.put_whole(layer, self._targets, pages)

    def part(self, layer: int) -> tuple[int, HeldPages] | None:
        """The contiguous part that this rank hands off: its first page in the prompt, and pages.

        None where there are fewer pages than ranks, and none is left for this one.
        """
        if self._part.start == self._part.stop:
            return None
        pages = HeldPages(self._pool.layer(layer), self._shared_pages, self._shared_index)
        return self._first_block + self._part.start, pages


def part_of(mesh: Mesh, count: int) -> slice:
    """Which of so many pages, that all sequence ranks have, this one hands off."""
    ranks, rank = mesh.sequence_parallel, mesh.sequence_rank
    return slice(count * rank // ranks, count * (rank + 1) // ranks)


def _pages_like(pool: PagePool, count: int) -> Pages:
    """Memory for so many pages of one layer; what is not written is 0."""
    scales = pool.scales
    return Pages(
        pool.memory.new_zeros(count, *pool.memory.shape[2:]),
        None if scales is None else scales.new_ones(count, *scales.shape[2:]),
    )
