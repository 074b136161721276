"""What a decode worker needs of an engine: Longreach's own, or another behind the same contract."""

from abc import ABC, abstractmethod

import torch

from ..errors import GenerationError
from ..kv.hand_off import Place
from ..kv.pages import Pages
from ..messages import Delta, GenerationRequest
from .grammar import Constraint
from .sampler import Logits

Output = tuple[str, Delta | GenerationError]
"""A request's id, and what came out for it. After an error nothing more comes for the request."""


class DecodeEngine(ABC):
    """Generates for many requests at once, out of pages that prefill hands over.

    A request's life here: `reserve`, `receive` for every page of its prompt, `start`, then `step`
    until its last choice has ended; `cancel` ends it at any moment. Not thread-safe, except for
    `receive`, which may run beside everything but `start` and `cancel` of the same request.
    """

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """That pages lie on."""

    @property
    @abstractmethod
    def usage(self) -> float:
        """Fraction of pages in use, 0 to 1."""

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """Whether a step would generate anything."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Sequences whose prompt is there, and that wait for a place in the batch."""

    @property
    @abstractmethod
    def num_generating(self) -> int:
        """Requests that have started and not ended."""

    @abstractmethod
    def is_generating(self, request_id: str) -> bool:
        """Whether more will come out for a request that has started."""

    @abstractmethod
    def check(self, request: GenerationRequest) -> None:
        """Refuse a request that could never be served. On any thread.

        Raises:
            CacheTooSmallError: it is larger than all pages together.
        """

    @abstractmethod
    def prepare(self, request: GenerationRequest) -> Constraint | None:
        """Compile what a request's answers are held to, if anything. On any thread; takes long.

        Raises:
            GrammarError: the grammar cannot be compiled.
        """

    @abstractmethod
    def reserve(self, request: GenerationRequest) -> None:
        """Allocate the pages of the whole prompt, and of everything that may be generated.

        Raises:
            CacheTooSmallError: as `check`.
            OutOfPagesError: the pages are not free now; nothing was allocated.
            InvalidRequestError: a request of that name is here already.
        """

    @abstractmethod
    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        """Put pages that were handed off in their place.

        Raises:
            TransferError: nothing is reserved under that name, or the pages do not fit in.
            ReceiveOutOfMemoryError: the device has no memory left for them on their way.
        """

    @abstractmethod
    def start(
        self, request_id: str, logits: Logits, constraint: Constraint | None = None
    ) -> list[Output]:
        """Let every choice of a request, whose pages are all there, join the batch.

        Args:
            logits: after the prompt's last token, [vocab] float32.
            constraint: what `prepare` made of the request; choices go on from copies.

        Returns:
            the first token of each choice for which there is room in the batch; the others wait
            with theirs. An OutOfMemoryError alone where there was no memory to start with, and
            the pages are free again.

        Raises:
            InvalidRequestError: nothing is reserved under that name, or it has started.
        """

    @abstractmethod
    def step(self) -> list[Output]:
        """Generate one token for each sequence in the batch, after filling the batch up.

        Where memory does not suffice for the batch, the request that joined last ends with an
        OutOfMemoryError, and the others go on with the next step.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown requests are no error."""
