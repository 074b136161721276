"""What the engine needs of vLLM, in the words of both: sequences in, tokens out, blocks counted."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from ...engine.kv.pages import PageMemory
from ...engine.messages import ChosenToken, SamplingParameters, Tokens
from .held_to import HeldTo


@dataclass(frozen=True, eq=False)
class NewSequence:
    """One choice of a request, for vLLM to generate.

    `seed` is the choice's own. `ends` are tokens behind which vLLM goes on no further. `held_to` is
    what masks its tokens, if anything does. Sequences with the same `family` find each other's
    pages in vLLM's prefix cache, and nobody else's; None: those of all others without one.
    The pages of one that is `handed_off` come from elsewhere, all of its prompt. If it is `shared`,
    those that others of its family find are kept when it has ended, until it is let go.
    """

    name: str
    prompt: Tokens
    sampling: SamplingParameters
    seed: int
    ends: tuple[int, ...]
    held_to: HeldTo | None = None
    family: str | None = None
    handed_off: bool = False
    shared: bool = False


@dataclass(frozen=True)
class Generated:
    """Tokens that a sequence got in a step; after `ended` there are no more.

    `failed` says why vLLM gave it up, if it did.
    """

    name: str
    tokens: Sequence[ChosenToken]
    ended: bool = False
    failed: str | None = None


class Core(Protocol):
    """vLLM, in this process. One call at a time, in turns with `step`."""

    @property
    def memory(self) -> PageMemory:
        """Of all its blocks, which are pages."""
        ...

    @property
    def num_pages(self) -> int:
        """That sequences may have, all together."""
        ...

    @property
    def num_free(self) -> int:
        """Pages that no sequence has. On any thread."""
        ...

    @property
    def is_settling(self) -> bool:
        """Whether tokens are being computed, or vLLM has yet to hear that sequences have ended."""
        ...

    @property
    def num_preemptions(self) -> int:
        """How often a sequence had to give its pages back and begin again. On any thread."""
        ...

    def add(self, sequence: NewSequence) -> None:
        """Take a sequence; one that is handed off waits for `begin`, and for pages until a step."""
        ...

    def pages_of(self, name: str) -> list[int]:
        """The numbers of a sequence's pages, in order; none yet, or none any more."""
        ...

    def num_pages_of(self, names: Sequence[str]) -> int:
        """Pages that these sequences have, each counted once.

        One that has ended has those that it shared, until it is let go; others than those that were
        ever here have none.
        """
        ...

    def num_computed(self, name: str) -> int:
        """Tokens of a sequence that are computed, or will be with the step under way."""
        ...

    def begin(self, name: str) -> None:
        """All pages of one that is handed off have come."""
        ...

    def let_go(self, name: str) -> None:
        """Nobody needs the pages any more that a sequence shared."""
        ...

    def abort(self, names: Sequence[str]) -> None:
        """End sequences that nobody waits for; others than those that are here are no error."""
        ...

    def end(self, name: str) -> None:
        """A sequence has said all that it is to say; one that has ended already is no error."""
        ...

    def step(self) -> list[Generated]:
        """One step, or what came out of the one before."""
        ...
