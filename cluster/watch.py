"""Whether what a cluster stands on is still there, looked at all the time.

Serve replaces its own parts when they fail. It cannot do so without Ray's GCS and raylet, and
says nothing when they are gone: the endpoint accepts connections then and does not answer.
"""

import threading
import time
from collections.abc import Callable, Mapping

_ENDED_SECONDS = 0.5
_SILENT_SECONDS = 5.0
_AGAIN_SECONDS = 0.5

Problem = str
Silent = Mapping[str, float]
"""Who does not answer now, and for how many seconds each may go on so."""


class SilenceBudget:
    """Who has not answered for how long."""

    def __init__(self) -> None:
        self._since: dict[str, float] = {}

    def update(self, silent: Silent, now: float) -> Problem | None:
        """Which of those that are silent now has been so for too long; None where none has."""
        self._since = {name: self._since.get(name, now) for name in silent}
        for name, since in self._since.items():
            if now - since >= silent[name]:
                return f"{name} has not answered for {now - since:.0f} s"
        return None


class ClusterWatch:
    """A thread that looks, and calls back once when the cluster is lost."""

    def __init__(
        self,
        ended: Callable[[], Problem | None],
        silent: Callable[[], Silent],
        on_lost: Callable[[Problem], None],
    ) -> None:
        """
        Args:
            ended: which process is gone; answers at once.
            silent: who does not answer; may take some seconds to find out.
            on_lost: called in the watching thread.
        """
        self._ended = ended
        self._silent = silent
        self._on_lost = on_lost
        self._budget = SilenceBudget()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="cluster-watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more. Does not wait for a look that is under way."""
        self._closing.set()

    def _run(self) -> None:
        ask_at = 0.0
        while not self._closing.wait(_ENDED_SECONDS):
            problem = self._ended()
            if problem is None and time.monotonic() >= ask_at:
                silent = self._silent()
                problem = self._budget.update(silent, time.monotonic())
                # Who answers for a moment between two silences must be seen to.
                ask_at = time.monotonic() + (_AGAIN_SECONDS if silent else _SILENT_SECONDS)
            if problem is not None and not self._closing.is_set():
                self._on_lost(problem)
                return
