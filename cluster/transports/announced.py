"""Pages that are announced and copied by whoever wants them: what such transports have in common.

Who has pages says which pages of its pool hold what, and how the pool is read; the other side reads
them by itself, and answers. So only a process itself ever writes into its own pages, and no write
of somebody else can come late.

Who may touch what, and when:

- The owner announces pages when the kernels that write them have run (`BackgroundHandOff`), so a
  reader needs no event of another process.
- The owner leaves them as they are until the reader has answered, and the reader answers when its
  copies have run.
- An owner that gives a request up may overwrite its pages under a copy. What the copy brings is
  then wrong, and nobody will ever read it: it goes to pages of that same request, which never
  starts. The reader's side must only keep those pages from others until the copy has run.
- A request that goes on after its owner has died does so behind the pages that had been copied.
  Whoever gives an owner up waits for its last copy before the owner hears of it.
"""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import ray

from ...engine.kv.hand_off import Place, RequestPages
from ...engine.kv.pages import HeldPages
from ..messages import WorkerDestination
from .actor_messages import WantedPages, WorkerHandOff, WorkerReceiver


@dataclass(frozen=True)
class AnnouncedRun:
    """Which pages of a pool hold what; `numbers` are theirs in that pool, int64 [n].

    `kv_heads` are those of the pool's that are meant; None: all of them.
    """

    place: Place
    numbers: npt.NDArray[np.int64]
    kv_heads: range | None = None


Announcement = tuple[Any, list[AnnouncedRun]]
"""How a pool is read, as the transport has it, and which of its pages hold what."""


class AnnouncingHandOff(WorkerHandOff):
    """Tells a decode worker which pages to copy. What is pushed must have been written.

    One message is under way at a time, and what is pushed meanwhile goes with the next: a message
    costs more than copying a layer's pages. The worker answers when it has copied: until then the
    pages may not be overwritten.

    Args:
        pool: how this rank's pages are read.
    """

    def __init__(self, destination: WorkerDestination, pool: Any) -> None:
        super().__init__(destination)
        self._pool = pool
        self._collected: list[AnnouncedRun] = []

    def push(self, place: Place, pages: HeldPages) -> None:
        self._collected.append(AnnouncedRun(place, pages.numbers, pages.kv_heads))
        if self._under_way:
            self._note(ray.wait(list(self._under_way), timeout=0)[0])
        if not self._under_way:
            self._send()

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        answer = self._ask_back([WantedPages.of(place, pages) for place, pages in wanted])
        if answer is not None:
            pool, runs = answer
            self._read_back(pool, list(zip(runs, (pages for _, pages in wanted), strict=True)))

    @abstractmethod
    def _read_back(self, pool: Any, runs: Sequence[tuple[AnnouncedRun, HeldPages]]) -> None:
        """Copy pages of the worker's pool into these."""

    def abandon(self) -> None:
        """Copies under way are not waited for; they do no harm, as is said above."""
        self._collected.clear()
        self._under_way.clear()

    def _send_rest(self) -> None:
        while self._under_way:
            self._wait_for_one()
        self._send()

    def _send(self) -> None:
        runs, self._collected = self._collected, []
        if runs:
            self._deliver((self._pool, runs), 0)


class AnnouncedReceiver(WorkerReceiver):
    """A worker's end.

    Args:
        pool: how this worker's pages are read.
        pages: of the worker's engine.
    """

    def __init__(self, worker: Any, pool: Any, pages: RequestPages) -> None:
        super().__init__(worker)
        self._pool, self._pages = pool, pages

    def send_back(self, request_id: str, message: Sequence[WantedPages]) -> Announcement:
        return self._pool, [self._run(request_id, wanted) for wanted in message]

    def _run(self, request_id: str, wanted: WantedPages) -> AnnouncedRun:
        """Copies into these pages have run: `receive` waits for them."""
        place, heads = wanted.place, wanted.num_kv_heads
        held = self._pages.held(request_id, place, wanted.num_pages, heads)
        first = place.first_kv_head - self._pages.first_kv_head
        return AnnouncedRun(place, held.numbers, range(first, first + heads))
