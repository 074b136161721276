"""What a decode worker needs of an engine: Longreach's own, or another behind the same contract."""

from abc import abstractmethod

import torch

from ..errors import GenerationError
from ..messages import Delta, GenerationRequest, Progress
from .arriving import ArrivingPages
from .grammar import Constraint
from .sampler import Logits

Output = tuple[str, Progress | Delta | GenerationError]
"""A request's id, and what came out for it. After an error nothing more comes for the request.

Progress is of prompts that the engine computes itself: after each part of them, the last included.
"""


class DecodeEngine(ArrivingPages):
    """Generates for many requests at once, out of pages that prefill hands over, or on its own.

    A request's life here: `reserve`, `receive` for every page of its prompt, `start`, then `step`
    until its last choice has ended. One whose prompt the engine computes itself: `admit`, then
    `step`. `cancel` ends either at any moment. Not thread-safe, except for `receive`, `held` and
    `complete_tokens`, which may run beside everything but `start` and `cancel` of the same request.
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
        """Whether a step would generate anything, or has something to say of the one before."""

    @property
    @abstractmethod
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt that `admit` takes; 0 where it takes none."""

    @property
    @abstractmethod
    def num_prompts(self) -> int:
        """Requests that were admitted, and whose prompts are not computed yet."""

    @property
    @abstractmethod
    def num_preemptions(self) -> int:
        """How often a request that was admitted had to make room for others, since the start."""

    @property
    @abstractmethod
    def num_waiting(self) -> int:
        """Sequences whose prompt is there, and that wait for a place in the batch or for pages."""

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
    def admit(self, request: GenerationRequest, constraint: Constraint | None = None) -> None:
        """Take a request whose prompt the engine computes itself, in steps beside others' tokens.

        Pages are taken as they are needed. Where none are left, one that was admitted may have to
        wait until others have ended, at any moment, and then goes on with the same tokens; it never
        fails for it, and never takes pages that were reserved.

        Args:
            constraint: what `prepare` made of the request; choices go on from copies.

        Raises:
            CacheTooSmallError: as `check`.
            OutOfPagesError: the pages of its prompt are not free now; nothing was allocated.
            InvalidRequestError: a request of that name is here already, its prompt is longer than
                `longest_prompt`, or it wants its prompt scored.
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

        A step may be under way on the device when this returns; what comes out of it is said the
        next time.

        Parts of prompts are computed in the same step, so many tokens at most that the others'
        keep their pace. Where memory does not suffice, the request that joined last ends with an
        OutOfMemoryError, and the others go on with the next step.
        """

    @abstractmethod
    def cancel(self, request_id: str) -> None:
        """Forget a request and free its pages; unknown requests are no error."""
