"""Pages of prompts that come from elsewhere, put where a request's block table says."""

from abc import abstractmethod

from ...kernels.pages import BlockTable
from ..errors import ReceiveOutOfMemoryError, RefusedPagesError, TransferError
from ..kv.arrivals import Arrivals
from ..kv.hand_off import Place, RequestPages
from ..kv.pages import HeldPages, Pages
from ..memory.out_of_memory import out_of_memory_raises


class ArrivingPages(RequestPages):
    """Whoever inherits says which requests take pages, and where these go."""

    @abstractmethod
    def arrivals_of(self, request_id: str) -> Arrivals:
        """What has come of a request's pages.

        Raises:
            TransferError: it takes none.
        """

    @abstractmethod
    def table_of(self, request_id: str) -> BlockTable:
        """Where a request's pages go.

        Raises:
            TransferError: it takes none.
        """

    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        with out_of_memory_raises(ReceiveOutOfMemoryError(request_id)):
            table = self.table_of(request_id).on(self.pool.device)
            table = table[place.first_page : place.first_page + len(pages)]
            try:
                self.pool.put(place.layer, table.long(), self._own_head(place), pages)
            except TransferError as error:
                raise RefusedPagesError(request_id, str(place), error) from error
        self.note_arrival(request_id, place, len(pages), pages.values.shape[1])

    def note_arrival(
        self, request_id: str, place: Place, num_pages: int, num_kv_heads: int
    ) -> None:
        own = Place(place.layer, place.first_page, self._own_head(place))
        self.arrivals_of(request_id).note(own, num_pages, num_kv_heads)

    def complete_tokens(self, request_id: str) -> int:
        return self.arrivals_of(request_id).complete_tokens

    def held(self, request_id: str, place: Place, num_pages: int, num_kv_heads: int) -> HeldPages:
        pages = self.table_of(request_id).pages[place.first_page : place.first_page + num_pages]
        held = self.pool.held(place.layer, pages).heads(self._own_head(place), num_kv_heads)
        if (len(held), held.layer.values.shape[1]) != (num_pages, num_kv_heads):
            raise TransferError(f"request {request_id} has no such pages at {place}")
        return held

    def _own_head(self, place: Place) -> int:
        """Of the pool's, the first head of pages at a place."""
        own = place.first_kv_head - self.first_kv_head
        if not 0 <= own < self.pool.geometry.num_kv_heads:
            raise TransferError(f"the pool has no head {place.first_kv_head}")
        return own
