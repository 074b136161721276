"""Messages to a decode worker that is a Ray actor: what both transports over Ray have in common."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import RayError

from ...engine.errors import TransferError
from ...engine.kv.hand_off import HandOff, Place, Receiver
from ...engine.kv.pages import HeldPages
from ..messages import WorkerDestination
from ..remedies import in_one_line

ANSWER_SECONDS = 60.0
"""A worker that answers nothing for so long takes no more pages. A hung one is replaced before."""


@dataclass(frozen=True)
class WantedPages:
    """Pages of one layer that a rank fetches."""

    place: Place
    num_pages: int
    num_kv_heads: int

    @classmethod
    def of(cls, place: Place, pages: HeldPages) -> "WantedPages":
        """Those that go into these."""
        return cls(place, len(pages), pages.layer.values.shape[1])


class WorkerReceiver(Receiver):
    """The end of a worker whose ranks send messages to its actor."""

    def __init__(self, worker: Any) -> None:
        self._worker = worker

    def destination(self, request_id: str, epoch: int, done: int) -> WorkerDestination:
        return WorkerDestination(request_id, done, self._worker, epoch)


class WorkerHandOff(HandOff):
    """Knows the messages that are under way with their bytes, and remembers the first failure."""

    def __init__(self, destination: WorkerDestination) -> None:
        self._destination = destination
        self._under_way: dict[ray.ObjectRef, int] = {}
        self._failure: str | None = None

    @property
    def failure(self) -> str | None:
        return self._failure

    def flush(self) -> None:
        self._send_rest()
        while self._under_way:
            self._wait_for_one()
        if self._failure is not None:
            raise TransferError(self._failure)

    @abstractmethod
    def _send_rest(self) -> None:
        """Send what was pushed and is not under way yet."""

    def _deliver(self, message: Any, size: int) -> None:
        if self._failure is None:
            self._under_way[self._destination.deliver(message)] = size

    def _ask_back(self, message: Any) -> Any:
        """What the worker answers to a message that asks for pages; None where it failed."""
        if self._failure is not None:
            return None
        asked = self._destination.ask_back(message)
        if not ray.wait([asked], timeout=ANSWER_SECONDS)[0]:
            self._fail(f"a decode worker sent no pages for {ANSWER_SECONDS:g} s")
            return None
        try:
            return ray.get(asked)
        except RayError as error:
            self._fail(f"pages did not come back from the decode worker: {in_one_line(error)}")
        return None

    def _wait_for_one(self) -> None:
        """Wait until one more message has been answered; without an answer in time, all failed."""
        arrived, _ = ray.wait(list(self._under_way), timeout=ANSWER_SECONDS)
        if arrived:
            self._note(arrived)
        else:
            self._fail(f"a decode worker took no pages for {ANSWER_SECONDS:g} s")

    def _note(self, arrived: Sequence[ray.ObjectRef]) -> None:
        for reference in arrived:
            self._under_way.pop(reference, None)
            try:
                ray.get(reference)
            except RayError as error:
                self._fail(f"pages did not reach the decode worker: {in_one_line(error)}")

    def _fail(self, failure: str) -> None:
        self._failure = self._failure or failure
        self._under_way.clear()
