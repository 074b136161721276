"""How fast a gang computes, as its autoscaling needs to know it."""

import time
from collections import deque
from collections.abc import Callable

_WINDOW_SECONDS = 30.0
_CHUNKS = 16


class Speed:
    """Tokens a second over the last chunks, and the share of the last half minute with work.

    Chunks end in the order in which they began. One may begin before the one in front of it has
    ended, and is computed from then on.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chunks: deque[tuple[float, float, int]] = deque(maxlen=_CHUNKS)  # start, end, tokens
        self._began: deque[float] = deque()
        self._last_end = float("-inf")

    def begin(self) -> None:
        """A chunk is given to the gang."""
        self._began.append(self._clock())

    def end(self, tokens: int) -> None:
        """The first that has not ended did, with so many tokens; one that failed has none."""
        start, self._last_end = max(self._began.popleft(), self._last_end), self._clock()
        if tokens:
            self._chunks.append((start, self._last_end, tokens))

    def load(self, tokens_to_go: int) -> dict[str, float]:
        """As `autoscaling.GangLoad` has it."""
        seconds = sum(end - start for start, end, _ in self._chunks)
        tokens = sum(tokens for _, _, tokens in self._chunks)
        return {
            "tokens_to_go": float(tokens_to_go),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "busy": self._busy(),
        }

    def _busy(self) -> float:
        now = self._clock()
        first = now - _WINDOW_SECONDS
        spans = [(start, end) for start, end, _ in self._chunks]
        if self._began:
            spans.append((max(self._began[0], self._last_end), now))
        worked = sum(max(end - max(start, first), 0.0) for start, end in spans)
        return min(worked / _WINDOW_SECONDS, 1.0)
