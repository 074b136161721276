"""A request that had to make room: its pages wait on the host until there is room again."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels.pages import BlockTable
from ..kv.pages import PagePool, movable
from .sequences import Reservation, TokenSequence, distinct_pages


@dataclass(eq=False)
class PutOff:
    """What its pages hold, so that what comes later is the same as if it had never left.

    `running` are its sequences that were in the batch or waited for a place in it; `done` are the
    tokens of its prompt that are computed, where it is not whole.
    """

    reservation: Reservation
    running: list[TokenSequence]
    done: int | None
    _values: Tensor
    _scales: Tensor | None
    _tables: list[list[int]]  # of each sequence: which of the pages, by their order

    @classmethod
    def take(
        cls,
        pool: PagePool,
        reservation: Reservation,
        running: list[TokenSequence],
        done: int | None,
    ) -> "PutOff":
        """Copy a started request's pages to the host, and give them back."""
        tables = [sequence.block_table for sequence in reservation.sequences]
        pages = distinct_pages(tables)
        order = {page: index for index, page in enumerate(pages)}
        index = torch.tensor(pages, device=pool.memory.device)
        values = movable(pool.memory).index_select(1, index).cpu()
        scales = None if pool.scales is None else pool.scales.index_select(1, index).cpu()
        pool.release(reservation.held_pages)
        places = [[order[page] for page in table.pages.tolist()] for table in tables]
        return cls(reservation, running, done, values, scales, places)

    @property
    def num_pages(self) -> int:
        """How many it comes back to."""
        return self._values.shape[1]

    def come_back(self, pool: PagePool) -> None:
        """Take as many pages again, with what was in them.

        Raises:
            OutOfPagesError: they are not free now; nothing was taken.
        """
        pages = pool.allocate(self.num_pages)
        index = torch.tensor(pages, device=pool.memory.device)
        movable(pool.memory).index_copy_(1, index, self._values.to(pool.memory.device))
        if pool.scales is not None and self._scales is not None:
            pool.scales.index_copy_(1, index, self._scales.to(pool.memory.device))
        held: set[int] = set()
        for sequence, places in zip(self.reservation.sequences, self._tables, strict=True):
            own = [pages[place] for place in places]
            pool.share([page for page in own if page in held])
            held.update(own)
            sequence.block_table = BlockTable.of(own)
