"""How long the parts of a request took, as its decode worker saw them."""

import time
from dataclasses import replace

from ...engine.messages import Delta, Finished, Timings
from ..messages import AnswerOrder, ComputedHere


class AnswerClock:
    """Counts and times what comes out of one request.

    Args:
        prompt_tokens: of the request.
        arrived: at the ingress, `time.time()`.
    """

    def __init__(self, order: AnswerOrder, prompt_tokens: int, arrived: float) -> None:
        self._taken, self._prompt, self._there = order.taken, order.prompt, order.prompt_there
        self._prompt_tokens, self._arrived = prompt_tokens, arrived
        self._tokens = 0
        self._first: float | None = None

    def prompt_is_computed(self, computed: ComputedHere) -> None:
        """The worker has computed the prompt itself."""
        self._there = computed.ended
        self._prompt = replace(
            self._prompt,
            queued=max(computed.began - self._arrived, 0.0),
            prefill=max(computed.ended - computed.began, 0.0),
            prefill_stages={"steps": computed.seconds},
        )

    def count(self, delta: Delta) -> None:
        """Note what has been generated."""
        self._tokens += len(delta.tokens)
        if delta.tokens and self._first is None:
            self._first = time.time()

    def finished(self) -> Finished:
        """What is said at the end."""
        now = time.time()
        first = now if self._first is None else self._first
        timings: Timings = replace(
            self._prompt,
            first_token=max(first - self._there, 0.0),
            served=max(now - self._taken, 0.0),
        )
        return Finished(self._prompt_tokens, self._tokens, timings)
