"""How fast a gang computes, as its autoscaling needs to know it."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_WINDOW_SECONDS = 30.0
_CHUNKS = 16


class Speed:
    """Tokens a second over the last chunks, and the share of the last half minute with work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._chunks: deque[tuple[float, float, int]] = deque(maxlen=_CHUNKS)  # start, end, tokens
        self._began: float | None = None

    @contextmanager
    def computing(self, tokens: int) -> Iterator[None]:
        """While a chunk of so many tokens is computed; one that fails counts for nothing."""
        self._began = began = self._clock()
        try:
            yield
            self._chunks.append((began, self._clock(), tokens))
        finally:
            self._began = None

    def load(self, tokens_to_go: int) -> dict[str, float]:
        """As `autoscaling.GangLoad` has it."""
        seconds = sum(end - began for began, end, _ in self._chunks)
        tokens = sum(tokens for _, _, tokens in self._chunks)
        return {
            "tokens_to_go": float(tokens_to_go),
            "tokens_per_second": tokens / seconds if seconds else 0.0,
            "busy": self._busy(),
        }

    def _busy(self) -> float:
        now = self._clock()
        first = now - _WINDOW_SECONDS
        spans = [(began, end) for began, end, _ in self._chunks]
        if self._began is not None:
            spans.append((self._began, now))
        worked = sum(max(end - max(began, first), 0.0) for began, end in spans)
        return min(worked / _WINDOW_SECONDS, 1.0)
