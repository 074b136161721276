"""The further ranks of a decode worker, as they take part in a request's life.

Each has pages of its own heads for every request, under the leader's numbers. A worker that is
alone has none, and then nothing here costs anything.
"""

import asyncio
from collections.abc import Awaitable, Sequence
from typing import Any

from ...engine.errors import TransferError, UnavailableError
from ...engine.kv.destination import Destination, Part, PartedDestination
from ...engine.kv.hand_off import Place, RequestPages
from ...kernels.page_size import pages_for
from ..call_errors import CallError, as_ours
from ..messages import WorkerDestination
from ..tasks import as_nobody, tell


class FurtherRanks:
    """Handles of the followers' actors, in the order of ranks.

    Args:
        pages: of the leader, whose KV heads are the first; each rank has as many.
    """

    def __init__(self, handles: Sequence[Any], pages: RequestPages) -> None:
        self._handles, self._pages = handles, pages

    async def expect(self, request_id: str, prompt_tokens: int) -> None:
        """Have them take pages of a request that the leader has reserved, as many as its prompt's.

        Raises:
            LostError: one of them is gone.
            UnavailableError: the request was released, or its pages are not known in time.
        """
        if not self._handles:
            return
        place = Place(0, 0, self._pages.first_kv_head)
        try:
            # Some engines say with their next step which pages they are, and that is awaited here.
            held = await asyncio.to_thread(
                self._pages.held, request_id, place, pages_for(prompt_tokens), 1
            )
        except TransferError as error:
            raise UnavailableError(f"{error}; send it again") from error
        await _all(
            [as_nobody(each.expect.remote, request_id, held.numbers) for each in self._handles]
        )

    async def go_on(self, request_id: str, epoch: int) -> list[int]:
        """Have them refuse pages of earlier epochs; tokens whose pages each of them has.

        Raises:
            LostError: one of them is gone.
            TransferError: the request was released.
        """
        return await _all(
            [as_nobody(each.go_on.remote, request_id, epoch) for each in self._handles]
        )

    def destination(self, leaders: Destination, epoch: int) -> Destination:
        """Where ranks send pages of all heads, the leader's among them."""
        if not self._handles:
            return leaders
        count = self._pages.pool.geometry.num_kv_heads
        own = [leaders] + [
            WorkerDestination(leaders.request_id, leaders.done, each, epoch)
            for each in self._handles
        ]
        parts = [Part(range(n * count, (n + 1) * count), each) for n, each in enumerate(own)]
        return PartedDestination(leaders.request_id, leaders.done, tuple(parts))

    def all_came(self, request_id: str) -> None:
        """All pages of a request have come; nobody waits."""
        for each in self._handles:
            tell(each.all_came.remote, request_id)

    async def close(self, request_id: str) -> None:
        """Return when none of them copies pages of a request any more, nor will.

        Raises:
            LostError: one of them is gone.
        """
        await _all([as_nobody(each.close.remote, request_id) for each in self._handles])


async def _all(calls: Sequence[Awaitable[Any]]) -> list[Any]:
    try:
        return list(await asyncio.gather(*calls))
    except CallError as error:
        raise as_ours(error) from error
