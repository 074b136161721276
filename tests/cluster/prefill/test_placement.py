"""Placing a gang, with Ray replaced by what it would say."""

import asyncio
import threading
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from longreach.cluster.prefill import placement
from longreach.cluster.prefill.placement import Placement
from longreach.engine.errors import ConfigurationError

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


@pytest.mark.parametrize(("room_after", "others_seconds"), [(0.3, 10.0), (None, 0.0)])
def test_a_gang_waits_for_the_one_that_it_replaces(
    monkeypatch: pytest.MonkeyPatch, room_after: float | None, others_seconds: float
) -> None:
    removed: list[Any] = []
    monkeypatch.setattr(placement, "_PLACEMENT_SECONDS", 0.05)
    monkeypatch.setattr(placement, "remove_placement_group", removed.append)
    settings = replace(make_settings(1).gangs[0], others_seconds=others_seconds)
    group = cast(Any, FakeGroup(room_after))
    placed = placement._placed(group, settings)
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

    monkeypatch.setattr(placement, "_PLACEMENT_SECONDS", 0.05)
    monkeypatch.setattr(placement, "placement_group", placement_group)
    monkeypatch.setattr(placement, "remove_placement_group", lambda group: None)
    settings = replace(make_settings(1).gangs[0], others_seconds=0.0)
    placed = replace(settings, prefill=settings.prefill.model_copy(update={"nodes": nodes}))
    with pytest.raises(ConfigurationError) as refused:
        asyncio.run(Placement.reserve(placed, tmp_path))
    labelled = {"bundle_label_selector": [nodes, nodes]} if nodes else {}
    assert asked == [{"ranks": 2, "strategy": "STRICT_PACK", **labelled}]
    assert ("pool=prefill" in str(refused.value)) == bool(nodes)
