"""How ranks meet, part and meet again.

Sequence ranks are alike: each has all pages of its KV heads, and computes its part of every chunk's
rows. So where one dies, the others go on as fewer, and a new one may come to them. Tensor ranks
have a part of the model each, and are nothing without each other: they come and go together, as a
`Row`. A mesh has one row for each sequence rank.

Ranks meet in the order of their rows. The numbers that they have in one mesh mean nothing in the
next.
"""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from ...engine.errors import ConfigurationError, LostError, UnavailableError
from ..pulse import Allowance, Reading, watch
from .placement import HEALTH, LEAVE
from .rank import Meeting

_LEAVE_SECONDS = 20.0
"""In which a rank that lives has left its mesh: NCCL takes about two to abort."""
_MEET_SECONDS = 60.0

# A chunk may take longer than any before it: a prompt's later ones attend to more. So only a stop
# of the whole process is found fast, and one within a chunk after minutes.
_ALLOWANCE = Allowance(seconds=60.0, times=4.0, slowest_at_least=30.0)


@dataclass(frozen=True, eq=False)
class Row:
    """The tensor ranks of one sequence rank. `number` says which bundles they have."""

    number: int
    ranks: tuple[Any, ...]

    def kill(self) -> None:
        """End them: each would wait for the one that is lost."""
        for rank in self.ranks:
            ray.kill(rank)


def ranks_of(rows: Sequence[Row]) -> list[Any]:
    """All of them, in the order in which they meet."""
    return [rank for row in rows for rank in row.ranks]


async def join(rows: Sequence[Row]) -> int:
    """Let new ranks meet and load; how many sequence ranks their gang needs at least.

    Raises:
        ConfigurationError: tensor ranks, which add up hidden states, would compute in two types.
        UnavailableError: one died, or hangs.
    """
    return await _watched(rows, _join(rows))


async def part(rows: Sequence[Row]) -> list[Row]:
    """Have all ranks leave their mesh; the rows that are whole.

    A row that has lost a rank, or in which one does not answer, is killed.
    """
    calls = {rank: asyncio.ensure_future(_left(rank)) for row in rows for rank in row.ranks}
    await asyncio.wait(calls.values())
    whole = [row for row in rows if all(calls[rank].result() for rank in row.ranks)]
    for row in rows:
        if row not in whole:
            row.kill()
    return whole


async def meet(rows: Sequence[Row]) -> None:
    """Have ranks that have left their mesh meet in a new one.

    Raises:
        LostError: one did not come.
    """
    ranks = ranks_of(rows)
    try:
        async with asyncio.timeout(_MEET_SECONDS):
            meeting = Meeting(await ranks[0].open_meeting.remote(), len(rows))
            calls = [rank.meet.remote(meeting, number) for number, rank in enumerate(ranks)]
            await asyncio.gather(*calls)
    except Exception as error:
        raise LostError(f"ranks of a gang did not meet again ({type(error).__name__})") from error


async def watch_ranks(rows: Sequence[Row], is_busy: Callable[[], bool]) -> str:
    """Return, in words, what has become of the first rank that died or hangs; its row is killed."""
    watches = {
        asyncio.create_task(watch(_reader(rank), is_busy, _ALLOWANCE)): row
        for row in rows
        for rank in row.ranks
    }
    try:
        done, _ = await asyncio.wait(watches, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for each in watches:
            each.cancel()
    first = next(iter(done))
    watches[first].kill()
    return f"rank {list(watches).index(first)} {first.result()}"


async def _left(rank: Any) -> bool:
    """Whether a rank lives, and has left its mesh."""
    try:
        async with asyncio.timeout(_LEAVE_SECONDS):
            await rank.leave.options(concurrency_group=LEAVE).remote()
    except Exception:
        # Whatever it was: nobody computes with this rank any more.
        return False
    return True


async def _join(rows: Sequence[Row]) -> int:
    """Each rank is told how many are on its card."""
    ranks = ranks_of(rows)
    types = set(await asyncio.gather(*(rank.compute_type.remote() for rank in ranks)))
    if len(rows[0].ranks) > 1 and len(types) > 1:
        raise ConfigurationError(
            f"machines of a gang would compute in {' and '.join(sorted(types))}, and tensor ranks "
            "need one type; set model.dtype to one of them"
        )
    meeting = Meeting(await ranks[0].open_meeting.remote(), len(rows))
    cards = await asyncio.gather(*(rank.card.remote() for rank in ranks))
    counts = Counter(cards)
    # On CPUs there is no card to divide.
    shared = [1 if card is None else counts[card] for card in cards]
    joins = [
        rank.join.remote(meeting, number, count)
        for number, (rank, count) in enumerate(zip(ranks, shared, strict=True))
    ]
    return max(await asyncio.gather(*joins))


async def _watched(rows: Sequence[Row], joining: Coroutine[Any, Any, int]) -> int:
    """Wait until all ranks have joined; a rank that dies or hangs meanwhile ends the wait.

    Raises:
        UnavailableError: one did. Otherwise as `joining`.
    """
    work = asyncio.ensure_future(joining)
    end = asyncio.ensure_future(_watch_loading(rows))
    try:
        await asyncio.wait({work, end}, return_when=asyncio.FIRST_COMPLETED)
        if not work.done():
            raise UnavailableError(f"{end.result()} while it loaded")
        return work.result()
    finally:
        for each in (work, end):
            each.cancel()


async def _watch_loading(rows: Sequence[Row]) -> str:
    # A process may take its time to start; from its first answer on it must go on answering.
    await asyncio.gather(*(_reader(rank)() for rank in ranks_of(rows)))
    return await watch_ranks(rows, is_busy=lambda: False)


def _reader(rank: Any) -> Callable[[], Awaitable[Reading]]:
    return rank.pulse.options(concurrency_group=HEALTH).remote
