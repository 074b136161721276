"""How finished pages travel from a prefill rank to a decode engine.

A transport has two ends, one object in each process: a rank's `Sender`, a decode worker's
`Receiver`. The receiver names a request's `Destination` when its pages are reserved; a rank opens
it and gets a `HandOff`, into which prefill pushes pages, layer by layer, while it computes. Nobody
in between knows what a destination is made of, or how bytes move, or whether they do.

A prompt whose gang has died goes on in another one. Its pages lie at the destination as far as they
had arrived, and the ranks fetch these back by the same way.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .destination import Destination
from .pages import HeldPages, PageMemory, Pages


@dataclass(frozen=True)
class Place:
    """Where consecutive pages of one layer belong, whatever pool they lie in.

    `first_page` counts within the sequence, `first_kv_head` within the whole model.
    """

    layer: int
    first_page: int
    first_kv_head: int


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
    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        """Bring back what lies at the destination, into pages that are held.

        Returns when it is there, or on a GPU ahead of whatever is launched later on the current
        stream. A failure is remembered rather than raised, as by `push`.

        Args:
            wanted: where at the destination, and into which pages. On a GPU, what is launched
                already on the current stream may still use these.
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


class RequestPages(ABC):
    """What an engine holds for requests: a receiver puts pages there, and sends them back.

    On any thread, also several at a time, as long as they write different pages.
    """

    @property
    @abstractmethod
    def pool(self) -> PageMemory:
        """Where all of them lie, for transports that reach into its memory."""

    @property
    def first_kv_head(self) -> int:
        """Of the model, the first head whose pages are here; the pool has those from it on."""
        return 0

    @abstractmethod
    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        """Put pages that were handed off in their place.

        Raises:
            TransferError: nothing is reserved under that name, or the pages do not fit in.
            ReceiveOutOfMemoryError: the device has no memory left for them on their way.
        """

    @abstractmethod
    def held(self, request_id: str, place: Place, num_pages: int, num_kv_heads: int) -> HeldPages:
        """Pages that a request holds at a place, of some KV heads, until it is cancelled.

        Raises:
            TransferError: nothing is reserved under that name, it has started, or it has none
                there.
        """

    @abstractmethod
    def note_arrival(
        self, request_id: str, place: Place, num_pages: int, num_kv_heads: int
    ) -> None:
        """Pages that `held` gave have been written, as `receive` would have.

        Raises:
            TransferError: nothing is reserved under that name, or it has started.
        """

    @abstractmethod
    def complete_tokens(self, request_id: str) -> int:
        """Tokens of a prompt, from its beginning on, whose pages have been received: whole pages.

        Raises:
            TransferError: nothing is reserved under that name, or it has started.
        """


class Receiver(ABC):
    """A decode worker's end of a transport.

    What is not said otherwise runs on one thread, but for messages of which `source_of` says who
    else is needed: those of one source run on a thread of their own.
    """

    @abstractmethod
    def destination(self, request_id: str, epoch: int, done: int) -> Destination:
        """Where ranks send a request's pages, which are reserved. On any thread.

        Args:
            epoch: travels with every message of the destination. Whoever takes messages refuses
                those of an earlier one, whose gang was given up.
            done: tokens whose pages are there.
        """

    def source_of(self, message: Any) -> str | None:
        """Without whom `receive` does not end; None where this process does it alone.

        On any thread.
        """
        return None

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
    def send_back(self, request_id: str, message: Any) -> Any:
        """What a `HandOff` that fetches is answered, to its message.

        Raises:
            TransferError: the request holds no pages, or not these.
            ReceiveOutOfMemoryError: the device has no memory left for them on their way.
        """

    @abstractmethod
    def close(self, request_id: str) -> None:
        """No more pages of a request come; returns when its last copy is done."""
