"""Serve's controller, which replaces everything else in a cluster, and which nobody replaces.

Ray starts it anew when it dies. Where it hangs, requests are served as before, and whatever dies
then stays dead.
"""

import logging
import threading
import time
from collections.abc import Callable

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError
from ray.serve._private.constants import SERVE_CONTROLLER_NAME, SERVE_NAMESPACE

_EVERY_SECONDS = 5.0
_PATIENCE_SECONDS = 30.0

logger = logging.getLogger(__name__)


class ControllerKeeper:
    """A thread that kills a controller which does not answer for too long; Ray starts it again.

    Args:
        answers: whether it does within so many seconds.
        restart: kills it.
    """

    def __init__(
        self,
        answers: Callable[[float], bool] | None = None,
        restart: Callable[[], None] | None = None,
        every: float = _EVERY_SECONDS,
        patience: float = _PATIENCE_SECONDS,
    ) -> None:
        self._answers, self._restart = answers or _answers, restart or _restart
        self._every, self._patience = every, patience
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="controller-keeper", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def close(self) -> None:
        """Look no more. Does not wait for a look that is under way."""
        self._closing.set()

    def _run(self) -> None:
        answered_at = time.monotonic()
        while not self._closing.wait(self._every):
            if self._answers(self._every):
                answered_at = time.monotonic()
            elif time.monotonic() - answered_at >= self._patience and not self._closing.is_set():
                logger.warning("Serve's controller hangs, and is started again")
                self._restart()
                answered_at = time.monotonic()


def _answers(seconds: float) -> bool:
    try:
        ray.get(_controller().check_alive.remote(), timeout=seconds)
    except (RayError, ValueError):  # it is being started again, or not there yet
        return False
    return True


def _restart() -> None:
    try:
        ray.kill(_controller(), no_restart=False)
    except (RayError, ValueError):
        logger.warning("Serve's controller is gone already", exc_info=True)


def _controller() -> ActorHandle:
    return ray.get_actor(SERVE_CONTROLLER_NAME, namespace=SERVE_NAMESPACE)
