"""What a worker has said to an ingress, until it is fetched."""

import asyncio
from collections.abc import Coroutine
from typing import Any

import pytest

from longreach.cluster.decode import outbox
from longreach.cluster.decode.outbox import Outboxes
from longreach.engine.messages import ChosenToken, Delta, Finished, Timings

FINISHED = Finished(1, 1, Timings(0, 0, 0, 0, 0))


def delta(text: str, choice: int = 0, reason: str | None = None) -> Delta:
    return Delta(choice, text, (ChosenToken(ord(text), -1.0),), reason)


def run(scenario: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(scenario, 5))


def test_an_ingress_gets_what_is_its_own_once_and_in_order() -> None:
    async def scenario() -> None:
        boxes = Outboxes()
        boxes.say("one", "a", delta("x"))
        boxes.say("other", "b", delta("y"))
        boxes.say("one", "c", delta("z"))
        boxes.say("one", "a", FINISHED)
        assert await boxes.fetch("one", 0.0) == [("a", [delta("x"), FINISHED]), ("c", [delta("z")])]
        assert await boxes.fetch("one", 0.0) == []
        assert await boxes.fetch("other", 0.0) == [("b", [delta("y")])]

    run(scenario())


def test_what_a_choice_says_before_it_is_fetched_is_one_delta() -> None:
    async def scenario() -> None:
        boxes = Outboxes()
        for each in (delta("x"), delta("p", 1), delta("y"), delta("z", 0, "stop"), FINISHED):
            boxes.say("one", "a", each)
        [(_, (first, second, end))] = await boxes.fetch("one", 0.0)
        tokens = tuple(ChosenToken(ord(each), -1.0) for each in "xyz")
        assert first == Delta(0, "xyz", tokens, "stop")
        assert (second, end) == (delta("p", 1), FINISHED)
        boxes.say("one", "a", delta("q", 1))
        assert await boxes.fetch("one", 0.0) == [("a", [delta("q", 1)])]

    run(scenario())


def test_whoever_fetches_waits_for_the_next_word() -> None:
    async def scenario() -> None:
        boxes = Outboxes()
        boxes.say("one", "a", delta("x"))
        assert await boxes.fetch("one", 60.0) == [("a", [delta("x")])]
        fetching = asyncio.create_task(boxes.fetch("one", 60.0))
        await asyncio.sleep(0.01)
        assert not fetching.done()
        boxes.say("one", "a", FINISHED)
        assert await fetching == [("a", [FINISHED])]

    run(scenario())


def test_only_what_nobody_fetches_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "FORGOTTEN_TICKS", 2)

    async def scenario() -> None:
        boxes = Outboxes()
        boxes.say("gone", "a", FINISHED)
        fetching = asyncio.create_task(boxes.fetch("waits", 60.0))
        await asyncio.sleep(0)
        for tick in range(4):
            boxes.tick()
            assert len(boxes) == (2 if tick < 2 else 1)
        fetching.cancel()
        assert await boxes.fetch("gone", 0.0) == []

    run(scenario())
