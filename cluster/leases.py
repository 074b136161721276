"""Who still wants what a decode worker holds: the leases of ingresses.

An ingress that dies cannot release anything, and what it says may be lost. So it names, again and
again for as long as it lives, the requests that it still wants of each worker; and a worker
releases those that nobody has named for a while. Time is counted in ticks of whoever waits: where a
process is starved, its ticks are late, and what has arrived meanwhile is heard before the next.
"""

import logging
import threading
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from .tasks import as_nobody

RENEWAL_SECONDS = 1.0
TICKS_WITHOUT_RENEWAL = 7
"""Ticks of RENEWAL_SECONDS after which a lease has run out."""

logger = logging.getLogger(__name__)


class LeaseBook:
    """A worker's: how many ticks ago each request that is here was named."""

    def __init__(self) -> None:
        self._silent_ticks: dict[str, int] = {}

    def add(self, request_id: str) -> None:
        """A request came: somebody wants it."""
        self._silent_ticks[request_id] = 0

    def remove(self, request_id: str) -> None:
        """A request is over; unknown ones are no error."""
        self._silent_ticks.pop(request_id, None)

    def renew(self, request_ids: Iterable[str]) -> None:
        """An ingress still wants these; unknown ones are no error."""
        for request_id in request_ids:
            if request_id in self._silent_ticks:
                self._silent_ticks[request_id] = 0

    def tick(self) -> list[str]:
        """Let a tick pass; the requests that nobody has named for too long."""
        for request_id in self._silent_ticks:
            self._silent_ticks[request_id] += 1
        return [r for r, ticks in self._silent_ticks.items() if ticks > TICKS_WITHOUT_RENEWAL]


class LeaseKeeper:
    """An ingress's: renews its leases from a thread, which no busy event loop holds up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._workers: dict[str, Any] = {}
        self._requests: defaultdict[str, set[str]] = defaultdict(set)
        self._closed = threading.Event()
        threading.Thread(target=self._run, name="leases", daemon=True).start()

    def hold(self, worker_id: str, worker: Any, request_id: str) -> None:
        """A worker has taken a request of ours."""
        with self._lock:
            self._workers[worker_id] = worker
            self._requests[worker_id].add(request_id)

    def drop(self, worker_id: str, request_id: str) -> None:
        """A request of ours is over there; unknown ones are no error."""
        with self._lock:
            self._requests[worker_id].discard(request_id)
            if not self._requests[worker_id]:
                del self._requests[worker_id]
                self._workers.pop(worker_id, None)

    def close(self) -> None:
        """Renew nothing any more."""
        self._closed.set()

    def _run(self) -> None:
        while not self._closed.wait(RENEWAL_SECONDS):
            with self._lock:
                leases = [(self._workers[w], tuple(ids)) for w, ids in self._requests.items()]
            for worker, request_ids in leases:
                try:
                    as_nobody(worker.renew.remote, request_ids)
                except Exception:
                    # One that is gone holds nothing; and no failure may end all other leases.
                    logger.warning("a lease was not renewed", exc_info=True)
