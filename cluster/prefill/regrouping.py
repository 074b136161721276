"""Keeps a gang going: where a rank is lost the others meet again, and whoever comes later joins.

Everything that happens to ranks happens in one task, one thing after the other. Chunks wait
meanwhile; nothing else does.
"""

import asyncio
import logging
from collections.abc import Callable

from ...engine.errors import OutOfMemoryError, UnavailableError, innermost
from .gang import Gang

logger = logging.getLogger(__name__)

Finishing = asyncio.Task[None]


class Regrouping:
    """Of one gang, whose chunks are begun only after `may_begin`.

    Args:
        is_busy: whether the gang has work.
        last_chunk: the task that is done when no chunk that was begun is under way any more.
        on_loss: told how many ranks were lost, when the others may go on. Every chunk that was
            under way has failed, and no hand-off that was is complete.
    """

    def __init__(
        self,
        gang: Gang,
        is_busy: Callable[[], bool],
        last_chunk: Callable[[], Finishing | None],
        on_loss: Callable[[int], None],
    ) -> None:
        self._gang, self._is_busy = gang, is_busy
        self._last_chunk, self._on_loss = last_chunk, on_loss
        self._together = asyncio.Event()
        self._together.set()
        self._failures: asyncio.Queue[BaseException] = asyncio.Queue()
        self._recruiting: asyncio.Task[None] | None = None
        self._settled: Finishing | None = None
        gang.tell_trouble_to(self.failed)

    async def may_begin(self) -> None:
        """Return when the ranks are together."""
        while not self._together.is_set():
            # It may be cleared again before whoever waits for it runs.
            await self._together.wait()

    def failed(self, error: BaseException) -> None:
        """A chunk failed, or what ranks give each other; none begins before they have met again."""
        self._together.clear()
        self._failures.put_nowait(error)

    async def run(self) -> None:
        """For as long as the gang can go on.

        Raises:
            LostError: too few ranks are left, or they did not meet again.
            Exception: what a chunk failed with, though no rank was lost.
        """
        try:
            while True:
                if self._recruiting is None and not self._gang.is_whole:
                    self._recruiting = asyncio.create_task(self._gang.recruit())
                await self._regroup(await self._trouble_or_border())
                if self._recruiting is not None and self._recruiting.done():
                    self._recruiting = None
        finally:
            if self._recruiting is not None:
                self._recruiting.cancel()

    async def _trouble_or_border(self) -> BaseException | None:
        """What has happened to a rank; None at a border.

        That is where new ranks are ready, and those that are together compute no chunk, and give
        each other no pages: those of a prompt that is fetched next, perhaps.
        """
        watching = asyncio.create_task(self._gang.watch(self._is_busy))
        failing = asyncio.create_task(self._failures.get())
        try:
            while True:
                waited: set[asyncio.Task] = {watching, failing}
                if self._recruiting is not None and not self._recruiting.done():
                    waited.add(self._recruiting)
                elif self._recruiting is not None:
                    self._together.clear()
                    last, told = self._last_chunk(), self._gang.told
                    has_ended = last is None or last is self._settled or _ended_well(last)
                    if has_ended and not told:
                        return None
                    waited |= told
                    if last is not None and not last.done():
                        waited.add(last)
                await asyncio.wait(waited, return_when=asyncio.FIRST_COMPLETED)
                if failing.done():
                    return failing.result()
                if watching.done():
                    return UnavailableError(watching.result())
        finally:
            watching.cancel()
            failing.cancel()

    async def _regroup(self, trouble: BaseException | None) -> None:
        self._together.clear()
        if trouble is not None:
            logger.warning("a rank of the prefill gang is in trouble: %s", innermost(trouble))
        lost = await self._gang.regroup()
        if trouble is not None and not lost and not _harms_no_rank(trouble):
            raise trouble
        self._settled = self._last_chunk()
        if self._settled is not None:
            await asyncio.wait({self._settled})
        while not self._failures.empty():
            self._failures.get_nowait()
        logger.warning("%d ranks of a prefill gang go on together", self._gang.num_ranks)
        if trouble is not None or lost:
            self._on_loss(lost)
        self._together.set()


def _harms_no_rank(trouble: BaseException) -> bool:
    return isinstance(innermost(trouble), OutOfMemoryError)


def _ended_well(task: Finishing) -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
