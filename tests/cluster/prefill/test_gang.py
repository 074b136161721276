"""Placing a gang, with Ray replaced by what it would say."""

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from ray.exceptions import ActorDiedError

from longreach.cluster import pulse
from longreach.cluster.prefill import gang
from longreach.cluster.pulse import Reading
from longreach.engine.errors import ConfigurationError, UnavailableError

from ..conftest import make_settings


class FakeGroup:
    """A placement group that has room after `seconds`, or never."""

    def __init__(self, seconds: float | None) -> None:
        self._seconds = seconds

    def ready(self) -> "FakeGroup":
        return self

    def future(self) -> Future[None]:
        made: Future[None] = Future()
        if self._seconds is not None:
            threading.Timer(self._seconds, made.set_result, [None]).start()
        return made


@pytest.mark.parametrize(("room_after", "drain_seconds"), [(0.3, 10.0), (None, 0.0)])
def test_a_gang_waits_for_the_one_that_it_replaces(
    monkeypatch: pytest.MonkeyPatch, room_after: float | None, drain_seconds: float
) -> None:
    removed: list[Any] = []
    monkeypatch.setattr(gang, "_PLACEMENT_SECONDS", 0.05)
    monkeypatch.setattr(gang, "remove_placement_group", removed.append)
    settings = replace(make_settings(1).gangs[0], drain_seconds=drain_seconds)
    group = cast(Any, FakeGroup(room_after))
    placed = gang._placed(group, settings)
    if room_after is not None:
        asyncio.run(placed)
        assert not removed
    else:
        with pytest.raises(ConfigurationError):
            asyncio.run(placed)
        assert removed == [group]


@pytest.mark.parametrize("nodes", [{}, {"pool": "prefill"}])
def test_ranks_are_placed_on_nodes_that_have_the_labels(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, nodes: dict[str, str]
) -> None:
    asked: list[dict[str, Any]] = []

    def placement_group(bundles: list[Any], **options: Any) -> FakeGroup:
        asked.append({"ranks": len(bundles), **options})
        return FakeGroup(None)

    monkeypatch.setattr(gang, "_PLACEMENT_SECONDS", 0.05)
    monkeypatch.setattr(gang, "placement_group", placement_group)
    monkeypatch.setattr(gang, "remove_placement_group", lambda group: None)
    settings = replace(make_settings(1).gangs[0], drain_seconds=0.0)
    placed = replace(settings, prefill=settings.prefill.model_copy(update={"nodes": nodes}))
    with pytest.raises(ConfigurationError) as refused:
        asyncio.run(gang.Gang.start(placed, tmp_path))
    labelled = {"bundle_label_selector": [nodes, nodes]} if nodes else {}
    assert asked == [{"ranks": 2, "strategy": "STRICT_PACK", **labelled}]
    assert ("pool=prefill" in str(refused.value)) == bool(nodes)


class FakeRank:
    """Says where it is, and writes down how it was asked to join."""

    def __init__(self, card: tuple[str, str] | None = None, computes_in: str = "float32") -> None:
        self.joined: list[tuple[tuple[str, int], int]] = []
        self.open_meeting = self._call(lambda: ("here", 1))
        self.compute_type = self._call(lambda: computes_in)
        self.card = self._call(lambda: card)
        self.join = self._call(lambda *given: self.joined.append(given))

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
    asyncio.run(gang._join(ranks, tensor_parallel=1))
    assert [rank.joined for rank in ranks] == [[(("here", 1), count)] for count in counts]


def test_tensor_ranks_that_would_compute_in_several_types_never_meet() -> None:
    """Sums of hidden states would not match. Sequence ranks exchange pages, which are alike."""
    ranks = [FakeRank(computes_in="bfloat16"), FakeRank(computes_in="float32")]
    with pytest.raises(ConfigurationError, match=r"bfloat16 and float32.*set model\.dtype"):
        asyncio.run(gang._join(ranks, tensor_parallel=2))
    assert not any(rank.joined for rank in ranks)
    asyncio.run(gang._join(ranks, tensor_parallel=1))
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
        gang, "watch", lambda read, is_busy, allowance: pulse.watch(read, is_busy, allowance, 0.001)
    )
    ranks: list[Any] = [LoadingRank(1000), LoadingRank(pulses)]

    async def join() -> None:
        await asyncio.Event().wait()

    async def run() -> None:
        await gang.Gang(cast(Any, None), ranks)._watched(join())

    with pytest.raises(UnavailableError, match="rank 1"):
        asyncio.run(asyncio.wait_for(run(), 5))


def test_what_a_rank_raises_while_it_loads_is_what_is_told() -> None:
    async def join() -> None:
        raise ConfigurationError("too little memory")

    async def run() -> None:
        await gang.Gang(cast(Any, None), [LoadingRank(1000)])._watched(join())

    with pytest.raises(ConfigurationError):
        asyncio.run(asyncio.wait_for(run(), 5))
