"""Which prompt a prefill gang computes next, and which prompts hold pages for it.

Pure bookkeeping over token and page counts.
"""

from dataclasses import dataclass

from ...engine.errors import CacheTooSmallError
from ...engine.fairness import Turns
from ...kernels.page_size import PAGE_TOKENS, pages_for


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one prompt; `is_last` when the prompt ends with them.

    `score_top`: the prompt's own tokens are scored, with so many alternatives.
    """

    request_id: str
    start: int
    end: int
    is_last: bool
    score_top: int | None = None


@dataclass
class _Entry:
    tokens: int
    score_top: int | None = None
    dealt: int = 0
    admitted: bool = False

    @property
    def pages(self) -> int:
        return pages_for(self.tokens)


class ChunkScheduler:
    """Deals out chunks of several prompts, each with all its pages held from its first chunk on.

    The order is that of `Turns`: the shorter kind first at every chunk border, with a bound on
    how often a prompt is passed. Where the prompt whose turn it is must wait for pages, no other
    is admitted before it, and those that hold pages go on; so where pages are short, a prompt is
    also passed by what they have to go.

    Args:
        chunk_tokens: of every chunk but a prompt's last; a multiple of PAGE_TOKENS.
        patience: see `Turns`.
    """

    def __init__(self, chunk_tokens: int, num_pages: int, patience: float) -> None:
        self._chunk_tokens = chunk_tokens
        self._num_pages = num_pages
        self._free_pages = num_pages
        self._turns = Turns(patience)
        self._entries: dict[str, _Entry] = {}

    @property
    def num_running(self) -> int:
        """Prompts that hold pages."""
        return sum(entry.admitted for entry in self._entries.values())

    @property
    def num_waiting(self) -> int:
        """Prompts that hold none yet."""
        return len(self._entries) - self.num_running

    @property
    def tokens_to_go(self) -> int:
        """Prompt tokens of all that no chunk has been dealt out for yet."""
        return sum(entry.tokens - entry.dealt for entry in self._entries.values())

    @property
    def usage(self) -> float:
        """Fraction of the pages that is held, 0 to 1."""
        return 1 - self._free_pages / self._num_pages

    def add(self, request_id: str, tokens: int, score_top: int | None = None) -> None:
        """Let a prompt wait for its turn.

        Args:
            score_top: for its chunks.

        Raises:
            CacheTooSmallError: it needs more pages than there are.
            InvalidRequestError: one of that name is here already.
        """
        entry = _Entry(tokens, score_top)
        if entry.pages > self._num_pages:
            raise CacheTooSmallError("prefill", tokens, self._num_pages * PAGE_TOKENS)
        self._turns.join(request_id, tokens)
        self._entries[request_id] = entry

    def remove(self, request_id: str) -> None:
        """Forget a prompt, finished or not, and free its pages; unknown ones are no error."""
        self._turns.leave(request_id)
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.admitted:
            self._free_pages += entry.pages

    def next(self) -> Chunk | None:
        """Deal out the chunk to compute now; None when nothing is left, or no pages to do it in.

        Each chunk is dealt out once, and counts as computed from then on: a prompt that is
        cancelled during its chunk has passed others all the same.
        """
        order = self._turns.order()
        if order and not self._holds_pages(order[0]):
            # Those that have pages go on: their ends bring pages for the one whose turn it is.
            order = [name for name in order if self._entries[name].admitted]
        return self._deal(order[0]) if order else None

    def _holds_pages(self, request_id: str) -> bool:
        """Whether a prompt has its pages; allocates them where enough are free."""
        entry = self._entries[request_id]
        if not entry.admitted and entry.pages <= self._free_pages:
            entry.admitted = True
            self._free_pages -= entry.pages
        return entry.admitted

    def _deal(self, request_id: str) -> Chunk:
        entry = self._entries[request_id]
        start = entry.dealt
        entry.dealt = min(start + self._chunk_tokens, entry.tokens)
        self._turns.serve(request_id, entry.dealt - start)
        is_last = entry.dealt == entry.tokens
        return Chunk(request_id, start, entry.dealt, is_last, entry.score_top)
