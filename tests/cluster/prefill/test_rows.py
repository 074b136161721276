"""Ranks that meet, part and meet again, with Ray replaced by what it would say."""

import asyncio
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import ray
from ray.exceptions import ActorDiedError

from longreach.cluster import pulse
from longreach.cluster.prefill import rows
from longreach.cluster.prefill.rank import Meeting
from longreach.cluster.prefill.rows import Row
from longreach.cluster.pulse import Reading
from longreach.engine.errors import ConfigurationError, LostError, UnavailableError


def each_alone(ranks: Sequence[Any]) -> list[Row]:
    """Rows of one rank each."""
    return [Row(number, (rank,)) for number, rank in enumerate(ranks)]


class FakeRank:
    """Says where it is, and writes down how it was asked to join."""

    def __init__(self, card: tuple[str, str] | None = None, computes_in: str = "float32") -> None:
        self.joined: list[tuple[Meeting, int, int]] = []
        self.open_meeting = self._call(lambda: ("here", 1))
        self.compute_type = self._call(lambda: computes_in)
        self.card = self._call(lambda: card)
        self.join = self._call(self._join)

    def _join(self, *given: Any) -> int:
        self.joined.append(given)
        return 1

    def _call(self, function: Callable[..., Any]) -> Any:
        async def remote(*given: Any) -> Any:
            return function(*given)

        return SimpleNamespace(remote=remote)


@pytest.mark.parametrize(
    ("cards", "counts"),
    [
        ([("a", "0"), ("a", "1"), ("a", "0"), ("b", "0")], [2, 1, 2, 1]),
        ([None, None], [1, 1]),
    ],
    ids=["gpus", "cpus"],
)
def test_a_rank_is_told_how_many_share_its_card(
    cards: list[tuple[str, str] | None], counts: list[int]
) -> None:
    """Each would else take all that is free there for its own."""
    ranks = [FakeRank(card) for card in cards]
    asyncio.run(rows._join(each_alone(ranks)))
    meeting = Meeting(("here", 1), len(ranks))
    expected = [[(meeting, number, count)] for number, count in enumerate(counts)]
    assert [rank.joined for rank in ranks] == expected


def test_tensor_ranks_that_would_compute_in_several_types_never_meet() -> None:
    """Sums of hidden states would not match. Sequence ranks exchange pages, which are alike."""
    ranks = [FakeRank(computes_in="bfloat16"), FakeRank(computes_in="float32")]
    with pytest.raises(ConfigurationError, match=r"bfloat16 and float32.*set model\.dtype"):
        asyncio.run(rows._join([Row(0, tuple(ranks))]))
    assert not any(rank.joined for rank in ranks)
    asyncio.run(rows._join(each_alone(ranks)))
    assert all(rank.joined for rank in ranks)


class LoadingRank:
    """Answers its pulse, until it dies."""

    def __init__(self, pulses: int) -> None:
        self.pulse = SimpleNamespace(options=lambda **given: SimpleNamespace(remote=self._answer))
        self._left = pulses

    async def _answer(self) -> Reading:
        self._left -= 1
        if self._left < 0:
            raise ActorDiedError
        return Reading(0.0, 0.0)


@pytest.mark.parametrize("pulses", [1, 2])
def test_a_rank_that_dies_while_it_loads_is_found(
    monkeypatch: pytest.MonkeyPatch, pulses: int
) -> None:
    """The others wait for it, and would for good."""
    monkeypatch.setattr(
        rows, "watch", lambda read, is_busy, allowance: pulse.watch(read, is_busy, allowance, 0.001)
    )
    ranks: list[Any] = [LoadingRank(1000), LoadingRank(pulses)]
    killed: list[Any] = []
    monkeypatch.setattr(ray, "kill", killed.append)

    async def join() -> int:
        await asyncio.Event().wait()
        raise AssertionError

    async def run() -> None:
        await rows._watched(each_alone(ranks), join())

    with pytest.raises(UnavailableError, match="rank 1"):
        asyncio.run(asyncio.wait_for(run(), 5))
    assert killed == [ranks[1]]


def test_what_a_rank_raises_while_it_loads_is_what_is_told() -> None:
    async def join() -> int:
        raise ConfigurationError("too little memory")

    async def run() -> None:
        await rows._watched(each_alone([LoadingRank(1000)]), join())

    with pytest.raises(ConfigurationError):
        asyncio.run(asyncio.wait_for(run(), 5))


class PartingRank:
    """Leaves its mesh and meets others, unless it is dead or hangs."""

    def __init__(self, name: str, state: str = "well") -> None:
        self.name, self.state = name, state
        self.met: list[tuple[Meeting, int]] = []
        self.leave = SimpleNamespace(options=lambda **given: SimpleNamespace(remote=self._leave))
        self.open_meeting = SimpleNamespace(remote=self._open_meeting)
        self.meet = SimpleNamespace(remote=self._meet)

    async def _leave(self) -> None:
        if self.state == "dead":
            raise ActorDiedError
        if self.state == "hangs":
            await asyncio.Event().wait()

    async def _open_meeting(self) -> tuple[str, int]:
        return self.name, 1

    async def _meet(self, meeting: Meeting, number: int) -> None:
        if self.state == "late":
            await asyncio.Event().wait()
        self.met.append((meeting, number))


@pytest.fixture
def killed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(ray, "kill", lambda rank: names.append(rank.name))
    monkeypatch.setattr(rows, "_LEAVE_SECONDS", 0.05)
    monkeypatch.setattr(rows, "_MEET_SECONDS", 0.05)
    return names


@pytest.mark.parametrize("state", ["dead", "hangs"])
def test_a_row_parts_with_the_rank_that_is_lost(state: str, killed: list[str]) -> None:
    """Its other tensor rank has a part of the model, and nothing to do without it."""
    first, second, third = (
        Row(number, (PartingRank(f"{number}-0"), PartingRank(f"{number}-1", each)))
        for number, each in enumerate(("well", state, "well"))
    )
    whole = asyncio.run(rows.part([first, second, third]))
    assert whole == [first, third]
    assert killed == ["1-0", "1-1"]
    asyncio.run(rows.meet(whole))
    meeting = Meeting(("0-0", 1), 2)
    met = [rank.met for row in whole for rank in row.ranks]
    assert met == [[(meeting, number)] for number in range(4)]


def test_ranks_that_do_not_all_meet_are_lost(killed: list[str]) -> None:
    with pytest.raises(LostError):
        asyncio.run(rows.meet(each_alone([PartingRank("a"), PartingRank("b", "late")])))
