"""How often, and for how long, what a process's death has interrupted is begun again.

Pure bookkeeping, of one request at one place: the ingress has it for whole attempts, a decode
replica for the gangs that compute a prompt.
"""

import time
from collections.abc import Callable

from ..engine.errors import (
    LongreachError,
    LostError,
    NotUpError,
    PoisonousError,
    TransferError,
)

RECOVERY_SECONDS = 180.0
"""How long a request waits for what is not up: longer than a gang takes to be replaced."""

_FIRST_WAIT, _LONGEST_WAIT = 0.2, 2.0


def was_lost(error: LongreachError) -> bool:
    """Whether what served a request was lost with it; else something was not up yet, or busy."""
    # A hand-off fails where the decode worker is gone, which the gang sees first.
    return isinstance(error, (LostError, TransferError))


class Recovery:
    """Counts deaths at the same place, and how long something has not been up.

    Args:
        retries: processes that may die under the request at one place of it. Where one more does,
            it is refused: the request may be what kills them. With 0 nothing is begun again, or
            waited for.
    """

    def __init__(self, retries: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._retries, self._clock = retries, clock
        self._deaths = 0
        # How far the request has come: tokens of the prompt, and of the answer.
        self._reached = self._died_at = (0, 0)
        self._wait = _FIRST_WAIT
        self._trouble_since: float | None = None

    @property
    def begins_again(self) -> bool:
        """Whether anything is begun again at all."""
        return self._retries > 0

    @property
    def reached(self) -> tuple[int, int]:
        """The furthest that the request has come: tokens of the prompt, and of the answer."""
        return self._reached

    def reach(self, prompt_tokens: int, answer_tokens: int = 0) -> None:
        """The request has come so far, in this attempt or in one before."""
        self._reached = max(self._reached, (prompt_tokens, answer_tokens))

    def goes_on(self) -> None:
        """Whatever was waited for is up."""
        self._trouble_since, self._wait = None, _FIRST_WAIT

    def failed(self, error: LongreachError, waits: bool = False) -> float:
        """Seconds after which to begin again.

        Args:
            waits: the error says that something is busy, and will not be for long.

        Raises:
            PoisonousError: too many processes have died under this request.
            LongreachError: the error, where beginning again would not help.
        """
        now = self._clock()
        if self._trouble_since is None:
            self._trouble_since = now
        died = was_lost(error)
        if self._retries == 0 or not (died or waits or isinstance(error, NotUpError)):
            raise error
        if died and not (isinstance(error, LostError) and not error.begun):
            self._count_death()
        if self._deaths > self._retries:
            raise PoisonousError(self._deaths) from error
        if now - self._trouble_since > RECOVERY_SECONDS:
            raise error
        wait, self._wait = self._wait, min(2 * self._wait, _LONGEST_WAIT)
        return wait

    def _count_death(self) -> None:
        """What kills processes does so again where it did before; chance does not."""
        got_further = self._reached > self._died_at
        self._deaths = 1 if got_further else self._deaths + 1
        self._died_at = self._reached
