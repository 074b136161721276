"""Who still wants what a decode worker holds: the leases of ingresses.

An ingress that dies cannot release anything. So it renews a lease, at every worker that it has
requests at, for as long as it lives; and a worker releases the requests of an ingress that it has
not heard of for a while. Time is counted in ticks of whoever waits: where a process is starved, its
ticks are late, and what has arrived meanwhile is heard before the next.
"""

import threading
from collections import defaultdict
from typing import Any

from .tasks import tell

RENEWAL_SECONDS = 1.0
TICKS_WITHOUT_RENEWAL = 7
"""Ticks of RENEWAL_SECONDS after which a lease has run out."""


class LeaseBook:
    """A worker's: which requests each ingress has here, and how long ago it was heard of."""

    def __init__(self) -> None:
        self._requests: defaultdict[str, set[str]] = defaultdict(set)
        self._silent_ticks: dict[str, int] = {}

    def add(self, holder: str, request_id: str) -> None:
        """A request came; its holder is alive."""
        self._requests[holder].add(request_id)
        self._silent_ticks[holder] = 0

    def remove(self, holder: str, request_id: str) -> None:
        """A request is over; unknown ones are no error."""
        self._requests[holder].discard(request_id)
        if not self._requests[holder]:
            del self._requests[holder]
            self._silent_ticks.pop(holder, None)

    def renew(self, holder: str) -> None:
        """A holder said that it is alive."""
        if holder in self._silent_ticks:
            self._silent_ticks[holder] = 0

    def tick(self) -> list[str]:
        """Let a tick pass; the requests whose holders have been silent for too long."""
        for holder in self._silent_ticks:
            self._silent_ticks[holder] += 1
        lapsed = [h for h, ticks in self._silent_ticks.items() if ticks > TICKS_WITHOUT_RENEWAL]
        return [request_id for holder in lapsed for request_id in sorted(self._requests[holder])]


class LeaseKeeper:
    """An ingress's: renews its leases from a thread, which no busy event loop holds up.

    Args:
        holder: the name that its requests carry, unlike that of any other.
    """

    def __init__(self, holder: str) -> None:
        self.holder = holder
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
                workers = list(self._workers.values())
            for worker in workers:
                tell(worker.renew.remote, self.holder)
