"""A request that had to make room: its pages wait on the host until there is room again."""

from dataclasses import dataclass

from ...kernels.pages import BlockTable
from ..kv.pages import PagePool, SetAside
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
    _aside: SetAside
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
        aside = pool.set_aside(pages)
        pool.release(reservation.held_pages)
        places = [[order[page] for page in table.pages.tolist()] for table in tables]
        return cls(reservation, running, done, aside, places)

    @property
    def num_pages(self) -> int:
        """How many it comes back to."""
        return len(self._aside)

    def come_back(self, pool: PagePool) -> None:
        """Take as many pages again, with what was in them.

        Raises:
            OutOfPagesError: they are not free now; nothing was taken.
        """
        pages = pool.allocate(self.num_pages)
        pool.bring_back(self._aside, pages)
        held: set[int] = set()
        for sequence, places in zip(self.reservation.sequences, self._tables, strict=True):
            own = [pages[place] for place in places]
            pool.share([page for page in own if page in held])
            held.update(own)
            sequence.block_table = BlockTable.of(own)

    def forget(self, pool: PagePool) -> None:
        """It never comes back."""
        pool.forget(self._aside)
