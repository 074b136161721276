"""Which prompt a prefill gang computes next: shortest remaining first, with ageing.

Pure bookkeeping over token and page counts and a clock that the caller reads.
"""

from dataclasses import dataclass

from ...engine.errors import InvalidRequestError, PromptTooLongError
from ...kernels.page_size import PAGE_TOKENS, pages_for


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, end) of one prompt; `is_last` when the prompt ends with them."""

    request_id: str
    start: int
    end: int
    is_last: bool


@dataclass
class _Entry:
    tokens: int
    waiting_since: float
    done: int = 0
    admitted: bool = False

    @property
    def pages(self) -> int:
        return pages_for(self.tokens)

    @property
    def remaining(self) -> int:
        return self.tokens - self.done


class ChunkScheduler:
    """Deals out chunks of several prompts, each with all its pages held from its first chunk on.

    A waiting prompt seems shorter by `ageing` tokens each second until it gets a chunk. So short
    ones overtake long ones at chunk boundaries, and one with n tokens to go waits n / ageing
    seconds at most, however many shorter ones come. Where the prompt whose turn it is must wait
    for pages, no other is let in before it.
    """

    def __init__(self, chunk_tokens: int, num_pages: int, ageing: float) -> None:
        self._chunk_tokens = chunk_tokens
        self._num_pages = num_pages
        self._free_pages = num_pages
        self._ageing = ageing
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
    def usage(self) -> float:
        """Share of pages held, 0 to 1."""
        return 1 - self._free_pages / self._num_pages

    def add(self, request_id: str, tokens: int, now: float) -> None:
        """Take a prompt in.

        Raises:
            PromptTooLongError: it needs more pages than there are.
            InvalidRequestError: one of that name is here already.
        """
        entry = _Entry(tokens, now)
        if request_id in self._entries:
            raise InvalidRequestError(f"request {request_id} is being prefilled already")
        if entry.pages > self._num_pages:
            raise PromptTooLongError(
                f"the prompt has {tokens} tokens and the prefill pool holds "
                f"{self._num_pages * PAGE_TOKENS} (prefill.kv_cache_tokens); shorten it"
            )
        self._entries[request_id] = entry

    def remove(self, request_id: str) -> None:
        """Forget a prompt, finished or not; unknown ones are no error."""
        entry = self._entries.pop(request_id, None)
        if entry is not None and entry.admitted:
            self._free_pages += entry.pages

    def next(self, now: float) -> Chunk | None:
        """The chunk to compute now; None when there is nothing to do, or no pages to do it in."""
        in_turn = sorted(
            self._entries.items(),
            key=lambda item: item[1].remaining - self._ageing * (now - item[1].waiting_since),
        )
        blocked = False
        for request_id, entry in in_turn:
            if entry.remaining == 0:
                continue
            if not entry.admitted:
                blocked = blocked or entry.pages > self._free_pages
                if blocked:
                    continue
                entry.admitted = True
                self._free_pages -= entry.pages
            end = min(entry.done + self._chunk_tokens, entry.tokens)
            return Chunk(request_id, entry.done, end, end == entry.tokens)
        return None

    def computed(self, chunk: Chunk, now: float) -> None:
        """Note that a chunk is done; its prompt may have been removed meanwhile."""
        entry = self._entries.get(chunk.request_id)
        if entry is not None:
            entry.done = chunk.end
            entry.waiting_since = now
