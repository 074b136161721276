"""Pages go to one waiting request after the other, in the order that is promised."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, cast

import numpy as np
import pytest

from longreach.cluster.decode.admission import Admission
from longreach.engine.decode.contract import DecodeEngine
from longreach.engine.errors import (
    InvalidRequestError,
    OutOfPagesError,
    PromptTooLongError,
    UnavailableError,
)
from longreach.engine.messages import GenerationRequest, SamplingParameters


class Pages:
    """As much of a decode engine as admission sees: a page for each token of a prompt."""

    def __init__(self, total: int) -> None:
        self.total, self.free = total, total
        self.held: dict[str, int] = {}
        self.tries = 0

    def check(self, request: GenerationRequest) -> None:
        if len(request.prompt) > self.total:
            raise PromptTooLongError("too long")

    def reserve(self, request: GenerationRequest) -> None:
        self.tries += 1
        needed = len(request.prompt)
        if needed > self.free:
            raise OutOfPagesError(needed, self.free, self.total)
        self.free -= needed
        self.held[request.request_id] = needed

    def cancel(self, request_id: str) -> None:
        self.free += self.held.pop(request_id, 0)


def make_request(name: str, tokens: int) -> GenerationRequest:
    prompt = np.zeros(tokens, dtype=np.int32)
    return GenerationRequest(name, prompt, SamplingParameters(max_tokens=1), arrived=0.0)


class Scene:
    """An admission over ten pages, and the requests in the order in which they got theirs."""

    def __init__(self, patience: float = 1000.0) -> None:
        self.pages = Pages(10)
        self.failures: list[BaseException] = []
        self.admission = Admission(
            cast(DecodeEngine, self.pages), asyncio.Lock(), patience, lambda: None,
            self.failures.append,
        )  # fmt: skip
        self.admitted: list[str] = []

    async def ask(self, name: str, tokens: int) -> None:
        await self.admission.reserve(make_request(name, tokens))
        self.admitted.append(name)

    def free(self, name: str) -> None:
        self.pages.cancel(name)
        self.admission.wake()


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def play(scenario: Callable[[Scene], Awaitable[object]], **given: Any) -> Scene:
    async def run() -> Scene:
        scene = Scene(**given)
        await scenario(scene)
        await settle()
        assert scene.failures == []
        return scene

    return asyncio.run(asyncio.wait_for(run(), 5))


def test_shorter_prompts_go_first_and_none_passes_one_whose_turn_it_is() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 8)
        asked = [
            asyncio.create_task(scene.ask(name, tokens))
            for name, tokens in (("nine", 9), ("three", 3), ("four", 4))
        ]
        await settle()
        assert scene.admission.num_waiting == 3
        scene.free("holder")
        await settle()
        # Two would fit beside them, and comes after "nine", which does not.
        assert scene.admitted == ["holder", "three", "four"]
        for name in ("three", "four"):
            scene.free(name)
        await asyncio.gather(*asked)

    assert play(scenario).admitted == ["holder", "three", "four", "nine"]


def test_whoever_was_passed_often_enough_passes_shorter_ones() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 7)
        asked = [asyncio.create_task(scene.ask("long", 9))]
        for n in range(6):
            asked.append(asyncio.create_task(scene.ask(f"short {n}", 3)))
            await settle()
            scene.free(f"short {n}")
        await settle()
        scene.free("holder")
        await settle()
        scene.free("long")
        await asyncio.gather(*asked)

    # After three short ones, nine tokens, the next waits behind it.
    shorts = [f"short {n}" for n in range(6)]
    assert play(scenario, patience=1.0).admitted == ["holder", *shorts[:3], "long", *shorts[3:]]


def test_nothing_is_tried_while_no_page_is_freed() -> None:
    """Steps that free nothing cost waiting requests nothing."""

    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 10)
        waiting = [asyncio.create_task(scene.ask(str(n), 5)) for n in range(50)]
        await settle()
        tries = scene.pages.tries
        await asyncio.sleep(0.02)
        assert scene.pages.tries == tries
        scene.free("holder")
        await settle()
        assert scene.pages.tries == tries + 3, "two fit, and the third does not"
        for task in waiting:
            task.cancel()

    play(scenario)


def test_one_that_leaves_lets_the_next_have_its_turn() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 6)
        large = asyncio.create_task(scene.ask("five", 5))
        await settle()
        small = asyncio.create_task(scene.ask("also five", 3))
        await small
        scene.free("also five")
        larger = asyncio.create_task(scene.ask("six", 6))
        await settle()
        large.cancel()
        await settle()
        assert scene.admission.num_waiting == 1
        scene.free("holder")
        await larger

    play(scenario)


def test_what_can_never_fit_is_refused_at_once_and_holds_nobody_up() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 10)
        waiting = asyncio.create_task(scene.ask("small", 2))
        with pytest.raises(PromptTooLongError):
            await scene.ask("huge", 11)
        scene.free("holder")
        await waiting

    play(scenario)


def test_a_refused_request_waits_no_longer() -> None:
    async def scenario(scene: Scene) -> None:
        await scene.ask("holder", 10)
        one, *others = [asyncio.create_task(scene.ask(name, 5)) for name in "abc"]
        await settle()
        scene.admission.refuse("a", InvalidRequestError("released"))
        with pytest.raises(InvalidRequestError):
            await one
        scene.admission.refuse_all(UnavailableError("failed"))
        for other in others:
            with pytest.raises(UnavailableError):
                await other
        assert scene.admission.num_waiting == 0

    play(scenario)
