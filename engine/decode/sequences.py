"""What a decoder knows of a request: its pages, and the sequences that its choices are."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from ...kernels.page_size import PAGE_TOKENS, pages_for
from ...kernels.pages import BlockTable
from ..kv.arrivals import Arrivals
from ..kv.pages import PagePool
from ..messages import GenerationRequest
from .answer import Answer
from .grammar import Constraint
from .sampler import Sampler
from .step import Outcome, StepRow


@dataclass(eq=False)
class TokenSequence:
    """One choice of a request. `length` tokens of prompt and answer have K and V in pages, without
    the step under way; `next_token` has none yet.

    `first` is what came out after the prompt. It is kept until there is a place in the batch, and
    is None before and afterwards. `place` is that of its outcome in the step under way, None where
    it is in none.
    """

    request_id: str
    block_table: BlockTable
    length: int
    sampler: Sampler
    answer: Answer
    constraint: Constraint | None
    first: Outcome | None = None
    next_token: int = -1
    place: int | None = None

    @property
    def row(self) -> StepRow:
        """What it brings to a step."""
        if self.place is not None:
            return StepRow(-1, self.length + 1, self.block_table, True, follows=self.place)
        drawing = None if self.takes_best else self.sampler.drawing
        if drawing is not None and self.constraint is not None:
            drawing = replace(drawing, allowed=self.constraint.allowed)
        return StepRow(self.next_token, self.length, self.block_table, self.takes_best, drawing)

    @property
    def takes_best(self) -> bool:
        """Whether the best token is all that would be looked at of the next logits."""
        return self.sampler.takes_best and self.constraint is None

    @property
    def runs_ahead(self) -> bool:
        """Whether the device finds each of its next tokens by itself, without a word of the host's.

        What ends it early, the host finds out a step later.
        """
        return self.takes_best and not self.answer.is_replayed

    @property
    def ends(self) -> bool:
        """Whether the step under way brings its last token, whatever that is."""
        return self.place is not None and self.answer.num_tokens + 1 == self.answer.most

    @property
    def lacks_a_page(self) -> bool:
        """Whether its pages are full, so that the token of the next step has no place."""
        length = self.length + (self.place is not None)
        return length == len(self.block_table.pages) * PAGE_TOKENS

    def grow(self, page: int) -> None:
        """Take one more page."""
        self.block_table = BlockTable.of([*self.block_table.pages.tolist(), page])


@dataclass(eq=False)
class Reservation:
    """The pages of one request: its sequences' block tables, shared ones counted in each.

    `number` rises with every request that is taken. `arrivals` are of its prompt's pages that
    come from elsewhere. One that `grows` has pages for its prompt and a
    little more, takes others as it generates, and may be put off; any other has all for certain.
    """

    request: GenerationRequest
    number: int
    grows: bool
    block_tables: list[BlockTable]
    arrivals: Arrivals
    sequences: list[TokenSequence] = field(default_factory=list)

    @property
    def started(self) -> bool:
        """Whether its pages are those of its sequences: from the first on, until the last ends."""
        return bool(self.sequences)

    @property
    def held(self) -> list[BlockTable]:
        """The tables of all pages that it holds."""
        return [each.block_table for each in self.sequences] if self.started else self.block_tables

    @classmethod
    def allocate(
        cls, pool: PagePool, request: GenerationRequest, number: int, grows: bool
    ) -> "Reservation":
        """Take pages for the prompt, and for all that may be generated, or for one token of it.

        Raises:
            OutOfPagesError: they are not free now; nothing was taken.
        """
        tables = _block_tables(request, pool.allocate(pages_needed(request, grows)))
        shared = len(request.prompt) // PAGE_TOKENS
        for table in tables[1:]:
            pool.share(table.pages[:shared].tolist())
        arrivals = Arrivals(pool.geometry, pages_for(len(request.prompt)))
        return cls(request, number, grows, tables, arrivals)

    @property
    def held_pages(self) -> list[int]:
        """All pages, shared ones as often as they are."""
        return [page for table in self.held for page in table.pages.tolist()]

    def copy_last_prompt_page(self, pool: PagePool) -> None:
        """A page that the prompt fills in part is written by every choice: each gets its own."""
        full, rest = divmod(len(self.request.prompt), PAGE_TOKENS)
        if rest:
            first, *others = self.held
            for table in others:
                pool.copy_page(int(first.pages[full]), int(table.pages[full]))


def pages_needed(request: GenerationRequest, at_first: bool = False) -> int:
    """Pages of the prompt, and of all that its choices may generate, or of one token `at_first`.

    Choices share the pages that the prompt fills; each has the rest to itself.
    """
    shared = len(request.prompt) // PAGE_TOKENS
    answer = 1 if at_first else request.sampling.max_tokens
    whole = pages_for(len(request.prompt) + answer)
    return shared + request.sampling.choices * (whole - shared)


def _block_tables(request: GenerationRequest, pages: list[int]) -> list[BlockTable]:
    """A block table for each choice; all begin with the same pages."""
    shared = len(request.prompt) // PAGE_TOKENS
    choices = request.sampling.choices
    own = (len(pages) - shared) // choices
    return [
        BlockTable.of(pages[:shared] + pages[shared + choice * own : shared + (choice + 1) * own])
        for choice in range(choices)
    ]


def distinct_pages(tables: Iterable[BlockTable]) -> list[int]:
    """Every page of some tables once, in the order in which they are met."""
    return list(dict.fromkeys(page for table in tables for page in table.pages.tolist()))
