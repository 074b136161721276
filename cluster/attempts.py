"""One request that outlives what serves it: it is begun again, behind what its client has.

Pure bookkeeping: whoever runs the attempts tells it what came and what went wrong.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ..engine.errors import LongreachError, QueueFullError
from ..engine.messages import Delta, Event, Finished, GenerationRequest, Progress
from .recovery import Recovery

logger = logging.getLogger(__name__)


class Attempts:
    """The attempts of one request, one after the other.

    A later one has the origin, the prompt and the seed of the first, and the tokens that the client
    has: it generates these again without saying so, and goes on as if nothing had happened.

    Args:
        retries: as `Recovery` takes them.
    """

    def __init__(
        self,
        request: GenerationRequest,
        retries: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._request = replace(request, sampling=request.sampling.seeded())
        self._recovery = Recovery(retries, clock)
        self._heard: list[list[int]] = [[] for _ in range(request.sampling.choices)]
        self._ended: set[int] = set()
        self._number = 0

    @property
    def request(self) -> GenerationRequest:
        """What the present attempt asks for. Ids never come twice."""
        return self._request

    def hear(self, event: Event) -> Event | None:
        """Note what this attempt said; what the client is to be told of it."""
        if isinstance(event, Progress):
            self._recovery.reach(event.done)
        if isinstance(event, Delta):
            self._recovery.goes_on()
            if event.choice in self._ended:
                return None
            self._heard[event.choice].extend(token.token_id for token in event.tokens)
            self._recovery.reach(len(self._request.prompt), sum(map(len, self._heard)))
            if event.finish_reason is not None:
                self._ended.add(event.choice)
        if isinstance(event, Finished):
            replayed = sum(map(len, self.request.replayed))
            return replace(event, completion_tokens=event.completion_tokens + replayed)
        return event

    def failed(self, error: LongreachError) -> float:
        """Seconds after which to begin again.

        Raises: as `Recovery.failed`.
        """
        # Who had a place has not lost it because others came while something was replaced.
        waits = isinstance(error, QueueFullError) and self._number > 0
        wait = self._recovery.failed(error, waits)
        self._number += 1
        origin = self._request.origin
        self._request = replace(
            self._request,
            request_id=f"{origin}-again-{self._number}",
            first_id=origin,
            replayed=tuple(map(tuple, self._heard)),
            computed=self._recovery.reached[0],
        )
        logger.warning(
            "request %s begins again in %.1f s, behind %d tokens: %s",
            origin,
            wait,
            sum(map(len, self._heard)),
            error,
        )
        return wait
