"""Which prompt a prefill gang computes next, and which prompts hold pages for it.

Pure bookkeeping over token and page counts.
"""

from dataclasses import dataclass

from ...engine.errors import CacheTooSmallError
from ...engine.fairness import Turns
from ...kernels.page_size import PAGE_TOKENS, pages_for

_BACK_TOKENS = 131_072
"""That come back at a time, in whole chunks: each time the ranks are told between two chunks of
other prompts. What came before one that fails need not be fetched again."""


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one prompt; `is_last` when the prompt ends with them.

    `score_top`: the prompt's own tokens are scored, with so many alternatives. `is_back`: they were
    computed before, as several chunks perhaps, and their pages come back from where they were
    handed off to.
    """

    request_id: str
    start: int
    end: int
    is_last: bool
    score_top: int | None = None
    is_back: bool = False

    @property
    def computed_tokens(self) -> int:
        """How many tokens are computed in it."""
        return 0 if self.is_back else self.end - self.start


@dataclass
class _Entry:
    """A prompt; `back` tokens of it need not be computed, and `dealt` are dealt out.

    While it is `fetching` a chunk that is back, it has its pages for itself, and no other turn.
    """

    tokens: int
    score_top: int | None = None
    back: int = 0
    dealt: int = 0
    admitted: bool = False
    fetching: bool = False

    @property
    def pages(self) -> int:
        return pages_for(self.tokens)


class ChunkScheduler:
    """Deals out chunks of several prompts, each with all its pages held from its first chunk on.

    The order is that of `Turns`: the shorter kind first at every chunk border, with a bound on
    how often a prompt is passed. Where the prompt whose turn it is must wait for pages, no other
    is admitted before it, and those that hold pages go on; so where pages are short, a prompt is
    also passed by what they have to go.

    A prompt that is over may leave its pages behind, in case that it is begun again. They count as
    free, and go as soon as somebody else needs the room.

    Args:
        chunk_tokens: of every chunk that is computed, but a prompt's last; a multiple of
            PAGE_TOKENS.
        patience: see `Turns`.
    """

    def __init__(self, chunk_tokens: int, num_pages: int, patience: float) -> None:
        self._chunk_tokens = chunk_tokens
        self._num_pages = num_pages
        self._free_pages = num_pages
        self._turns = Turns(patience)
        self._entries: dict[str, _Entry] = {}
        self._left: dict[str, _Entry] = {}  # the oldest first
        self._computing: dict[Chunk, _Entry] = {}
        self._taken: list[str] = []

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
        """Prompt tokens to compute of all that no chunk has been dealt out for yet."""
        every = self._entries.values()
        return sum(entry.tokens - max(entry.dealt, entry.back) for entry in every)

    @property
    def usage(self) -> float:
        """Fraction of the pages that is held, 0 to 1, without those that were left behind."""
        return 1 - (self._free_pages + self._left_pages) / self._num_pages

    @property
    def _left_pages(self) -> int:
        return sum(entry.pages for entry in self._left.values() if not entry.fetching)

    def add(
        self, request_id: str, tokens: int, score_top: int | None = None, done: int = 0
    ) -> None:
        """Let a prompt wait for its turn.

        Args:
            score_top: for its chunks.
            done: tokens whose pages can be brought back. Whole chunks are, so that the others
                begin where they would have; none where a prompt is scored, as scores are not.

        Raises:
            CacheTooSmallError: it needs more pages than there are.
            InvalidRequestError: one of that name is here already.
        """
        back = self.whole_chunks(tokens, done) if score_top is None else 0
        entry = _Entry(tokens, score_top, back)
        if entry.pages > self._num_pages:
            raise CacheTooSmallError("prefill", tokens, self._num_pages * PAGE_TOKENS)
        self._turns.join(request_id, tokens)
        self._entries[request_id] = entry

    def leave(self, request_id: str) -> None:
        """End a prompt, finished or not, and let its pages lie, where it has any."""
        self._turns.leave(request_id)
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.admitted:
            self._left[request_id] = entry

    def left_behind(self, request_id: str) -> int:
        """Tokens behind which a prompt that was left could go on; 0 where none lie there.

        Whole chunks; the last one is computed again where all were: the logits are wanted.
        """
        entry = self._left.get(request_id)
        return 0 if entry is None else self.whole_chunks(entry.tokens, entry.dealt)

    def come_back(self, request_id: str, to: str) -> int:
        """Let a prompt that was left go on under another name; behind how many tokens.

        None of its chunks is under way: what those are worth, nobody knows yet.
        """
        done = self.left_behind(request_id)
        entry = self._left.pop(request_id)
        self._turns.join(to, entry.tokens - done)
        entry.dealt, entry.back, entry.score_top = done, 0, None
        self._entries[to] = entry
        return done

    def ended(self, chunk: Chunk, is_computed: bool) -> None:
        """A chunk that was dealt out is over; where it failed, its prompt goes on before it."""
        entry = self._computing.pop(chunk)
        if chunk.is_back:
            entry.fetching = False
        if not is_computed:
            entry.dealt = min(entry.dealt, chunk.start)

    def is_fetching(self, request_id: str) -> bool:
        """Whether a chunk of a prompt that is back has not ended; its pages cannot be freed."""
        entry = self._entries.get(request_id) or self._left.get(request_id)
        return entry is not None and entry.fetching

    def taken(self) -> list[str]:
        """Prompts whose pages, which they had left, somebody else has got since the last time."""
        taken, self._taken = self._taken, []
        return taken

    def remove(self, request_id: str) -> None:
        """Forget a prompt, finished or not, and free its pages; unknown ones are no error."""
        self._turns.leave(request_id)
        entry = self._entries.pop(request_id, None) or self._left.pop(request_id, None)
        if entry is not None and entry.admitted:
            self._free_pages += entry.pages

    def next(self) -> Chunk | None:
        """Deal out the chunk to compute now; None when nothing is left, or no pages to do it in.

        Each chunk is dealt out once, and counts as computed from then on, unless `ended` says that
        it was not: a prompt that is cancelled during its chunk has passed others all the same.
        """
        # Whoever waits for pages that come back holds nobody else up.
        order = [name for name in self._turns.order() if not self._entries[name].fetching]
        if order and not self._holds_pages(order[0]):
            # Those that have pages go on: their ends bring pages for the one whose turn it is.
            order = [name for name in order if self._entries[name].admitted]
        return self._deal(order[0]) if order else None

    def _holds_pages(self, request_id: str) -> bool:
        """Whether a prompt has its pages; allocates them where enough are free."""
        entry = self._entries[request_id]
        if not entry.admitted and self._make_room(entry.pages):
            entry.admitted = True
            self._free_pages -= entry.pages
        return entry.admitted

    def _make_room(self, pages: int) -> bool:
        """Whether so many pages are free; takes those that were left, the oldest, if that helps."""
        if pages > self._free_pages + self._left_pages:
            return False
        while pages > self._free_pages:
            oldest = next(name for name, entry in self._left.items() if not entry.fetching)
            self.remove(oldest)
            self._taken.append(oldest)
        return True

    def whole_chunks(self, tokens: int, done: int) -> int:
        """Those of `done` tokens that are whole chunks, and not all of the prompt's."""
        return min(done, tokens - 1) // self._chunk_tokens * self._chunk_tokens

    def _deal(self, request_id: str) -> Chunk:
        entry = self._entries[request_id]
        start = entry.dealt
        is_back = start < entry.back
        if is_back:
            most = max(_BACK_TOKENS // self._chunk_tokens, 1) * self._chunk_tokens
            entry.dealt = min(start + most, entry.back)
        else:
            entry.dealt = min(start + self._chunk_tokens, entry.tokens)
        self._turns.serve(request_id, entry.dealt - start)
        is_last = entry.dealt == entry.tokens
        entry.fetching = is_back
        chunk = Chunk(request_id, start, entry.dealt, is_last, entry.score_top, is_back)
        self._computing[chunk] = entry
        return chunk
