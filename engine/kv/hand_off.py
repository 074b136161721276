"""How finished pages travel from a prefill rank to a decode replica.

Prefill pushes, layer by layer, while it computes; the decode replica has reserved the pages
before. One interface, so that callers do not know how bytes move, or whether they do.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from .pages import HeldPages


@dataclass(frozen=True)
class Place:
    """Where consecutive pages of one layer belong, whatever pool they lie in.

    `first_page` counts within the sequence, `first_kv_head` within the whole model.
    """

    layer: int
    first_page: int
    first_kv_head: int


class PageSender(ABC):
    """One prefill rank's way to one decode replica, for one request."""

    @property
    def failure(self) -> str | None:
        """Why the hand-off failed, if it did and it is known yet."""
        return None

    @abstractmethod
    def push(self, place: Place, pages: HeldPages) -> None:
        """Start sending consecutive pages of one layer; may block while too much is under way.

        Args:
            pages: held and left as they are until `flush` has returned or `abandon` is called. On
                a GPU, what is launched already on the current stream writes them.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when everything pushed lies in the decode replica's pages.

        Raises:
            TransferError: the replica is gone or refused; the request cannot go on there.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Drop what is under way; no more pushes follow, and the pages may be overwritten."""
