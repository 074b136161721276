"""How finished pages travel from a prefill rank to a decode engine.

A transport has two ends, one object in each process: a rank's `Sender`, a decode worker's
`Receiver`. The receiver names a request's `Destination` when its pages are reserved; a rank opens
it and gets a `HandOff`, into which prefill pushes pages, layer by layer, while it computes. Nobody
in between knows what a destination is made of, or how bytes move, or whether they do.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from .pages import HeldPages


@dataclass(frozen=True)
class Place:
    """Where consecutive pages of one layer belong, whatever pool they lie in.

    `first_page` counts within the sequence, `first_kv_head` within the whole model.
    """

    layer: int
    first_page: int
    first_kv_head: int


@dataclass(frozen=True)
class Destination:
    """Where one request's pages go. Picklable; what else it holds is its transport's own."""

    request_id: str


class HandOff(ABC):
    """One prefill rank's way to one destination."""

    @property
    def failure(self) -> str | None:
        """Why the hand-off failed, if it did and it is known yet."""
        return None

    @abstractmethod
    def push(self, place: Place, pages: HeldPages) -> None:
        """Start sending consecutive pages of one layer; may block while too much is under way.

        A failure is remembered rather than raised: a rank that left a chunk half-way would leave
        the other ranks waiting for it.

        Args:
            pages: held and left as they are until `flush` has returned or `abandon` is called. On
                a GPU, what is launched already on the current stream writes them.
        """

    @abstractmethod
    def flush(self) -> None:
        """Return when everything pushed lies in the destination's pages.

        Raises:
            TransferError: the decode engine is gone, refused, or did not answer for too long; the
                request cannot go on there.
        """

    @abstractmethod
    def abandon(self) -> None:
        """Drop what is under way; no more pushes follow, and the pages may be overwritten."""


class Sender(ABC):
    """A prefill rank's end of a transport."""

    @abstractmethod
    def open(self, destination: Destination) -> HandOff:
        """Begin to hand one request's pages off."""


class Receiver(ABC):
    """A decode worker's end of a transport. What is not said otherwise runs on one thread."""

    @abstractmethod
    def destination(self, request_id: str) -> Destination:
        """Where ranks send a request's pages, which are reserved. On any thread."""

    @abstractmethod
    def receive(self, request_id: str, message: Any) -> int:
        """Put the pages of one message of a `HandOff` into the request's own.

        Returns:
            their bytes, when they lie there or, on a GPU, when the copies are ahead of every later
            step on the stream that both use.

        Raises:
            TransferError: the request takes no pages, or not these.
        """

    @abstractmethod
    def close(self, request_id: str) -> None:
        """No more pages of a request come; returns when its last copy is done."""
