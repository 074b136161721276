"""One request that outlives what serves it: it is begun again, behind what its client has.

Pure bookkeeping: whoever runs the attempts tells it what came and what went wrong.
"""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

from ..engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    PoisonousError,
    QueueFullError,
    TransferError,
)
from ..engine.messages import Delta, Event, Finished, GenerationRequest, Progress

RECOVERY_SECONDS = 180.0
"""How long a request waits for what is not up: longer than a gang takes to be replaced."""

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 2.0

logger = logging.getLogger(__name__)


class Attempts:
    """The attempts of one request, one after the other.

    A later one has the name, the prompt and the seed of the first, and the tokens that the client
    has: it generates these again without saying so, and goes on as if nothing had happened.

    Args:
        retries: processes that may die under the request at one place of it. Where one more does,
            it is refused: the request may be what kills them. With 0 nothing is begun again, or
            waited for.
    """

    def __init__(
        self,
        request: GenerationRequest,
        retries: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name = request.request_id
        self._request = replace(request, sampling=request.sampling.seeded())
        self._retries, self._clock = retries, clock
        self._heard: list[list[int]] = [[] for _ in range(request.sampling.choices)]
        self._ended: set[int] = set()
        self._number, self._deaths = 0, 0
        # How far an attempt has come: tokens of the prompt, and of the answer.
        self._reached = self._died_at = (0, 0)
        self._wait = _FIRST_WAIT
        self._trouble_since: float | None = None

    @property
    def request(self) -> GenerationRequest:
        """What the present attempt asks for. Ids never come twice."""
        return self._request

    def hear(self, event: Event) -> Event | None:
        """Note what this attempt said; what the client is to be told of it."""
        if isinstance(event, Progress):
            self._reached = max(self._reached, (event.done, 0))
        if isinstance(event, Delta):
            self._trouble_since, self._wait = None, _FIRST_WAIT
            if event.choice in self._ended:
                return None
            self._heard[event.choice].extend(token.token_id for token in event.tokens)
            whole = len(self._request.prompt)
            self._reached = (whole, sum(map(len, self._heard)))
            if event.finish_reason is not None:
                self._ended.add(event.choice)
        if isinstance(event, Finished):
            replayed = sum(map(len, self.request.replayed))
            return replace(event, completion_tokens=event.completion_tokens + replayed)
        return event

    def failed(self, error: LongreachError) -> float:
        """Seconds after which to begin again.

        Raises:
            PoisonousError: too many processes have died under this request.
            LongreachError: the error, where another attempt would not help.
        """
        now = self._clock()
        if self._trouble_since is None:
            self._trouble_since = now
        self._check(error, now)
        self._number += 1
        self._request = replace(
            self._request,
            request_id=f"{self._name}-again-{self._number}",
            replayed=tuple(map(tuple, self._heard)),
        )
        wait, self._wait = self._wait, min(2 * self._wait, _LONGEST_WAIT)
        logger.warning(
            "request %s begins again in %.1f s, behind %d tokens: %s",
            self._name,
            wait,
            sum(map(len, self._heard)),
            error,
        )
        return wait

    def _check(self, error: LongreachError, now: float) -> None:
        assert self._trouble_since is not None
        # A hand-off fails where the decode worker is gone, which the gang sees first.
        died = isinstance(error, (LostError, TransferError))
        spared = isinstance(error, LostError) and not error.begun
        # Who had a place has not lost it because others came while something was replaced.
        waits = isinstance(error, NotUpError) or (
            isinstance(error, QueueFullError) and self._number > 0
        )
        if self._retries == 0 or not (died or waits):
            raise error
        if died and not spared:
            self._count_death()
        if self._deaths > self._retries:
            raise PoisonousError(self._deaths) from error
        if now - self._trouble_since > RECOVERY_SECONDS:
            raise error

    def _count_death(self) -> None:
        """What kills processes does so again where it did before; chance does not."""
        got_further = self._reached > self._died_at
        self._deaths = 1 if got_further else self._deaths + 1
        self._died_at = self._reached
