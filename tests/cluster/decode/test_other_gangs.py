"""When prompts are to leave a gang that was asked to go."""

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain, repeat
from typing import Any, cast

import pytest
from ray.serve.exceptions import RayServeException

from longreach.cluster.decode import other_gangs
from longreach.cluster.decode.other_gangs import OtherGangs, PromptAtGang
from longreach.cluster.messages import Standing
from longreach.cluster.settings import HandOffTerms, ModelSettings

TERMS = HandOffTerms(ModelSettings(path="pocket", name="a model"), "object_store")
HAS_IT, COULD, CANNOT = (
    Standing(frozenset("a"), takes_others=True),
    Standing(frozenset(), takes_others=True),
    Standing(frozenset(), takes_others=False),
)
Said = list[Standing] | Exception


class Gangs:
    """A deployment's handle: what all gangs on Serve's list say, time after time."""

    def __init__(self, *said: Said) -> None:
        self._said: Iterator[Said] = chain(said, repeat(said[-1]))
        self.asked: list[set[str]] = []

    def broadcast(self, method: str, names: list[str], terms: HandOffTerms) -> "Gangs":
        assert (method, terms) == ("standing", TERMS)
        self.asked.append(set(names))
        return self

    async def results_async(self, timeout_s: float) -> list[Standing]:
        said = next(self._said)
        if isinstance(said, Exception):
            raise said
        return said


def prompt_at(gangs: Gangs, name: str) -> PromptAtGang:
    return PromptAtGang(cast(Any, gangs), name)


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_gangs, "_LOOK_SECONDS", 0.0)


async def after(gangs: Gangs, looks: int) -> bool:
    prompt = prompt_at(gangs, "a")
    with OtherGangs(TERMS).watching(prompt):
        while len(gangs.asked) < looks and not prompt.is_to_go_on:
            await asyncio.sleep(0)
    assert all(names == {"a"} for names in gangs.asked)
    return prompt.is_to_go_on


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("said", "goes_on"),
    [
        ([[COULD]], True),
        ([[COULD, CANNOT]], True),
        ([[HAS_IT, COULD]], False),
        ([[HAS_IT]], False),
        ([[CANNOT]], False),  # another configuration's
        ([[]], False),
        ([RayServeException("none is up")], False),
        ([TimeoutError()], False),
        ([RuntimeError("of Serve's router"), [COULD], [COULD]], True),
        # Serve's list may have been late once.
        ([[COULD], [HAS_IT, COULD], [COULD], [HAS_IT, COULD]], False),
        ([[COULD], TimeoutError(), [COULD], TimeoutError()], False),
    ],
)
def test_a_prompt_leaves_where_only_others_are_on_the_list(said: list[Said], goes_on: bool) -> None:
    assert asyncio.run(after(Gangs(*said), looks=8)) is goes_on


@pytest.mark.usefixtures("at_once")
def test_whoever_is_to_leave_once_is_asked_about_no_more() -> None:
    async def scenario() -> int:
        gangs = Gangs([COULD], [COULD], [HAS_IT])
        prompt = prompt_at(gangs, "a")
        with OtherGangs(TERMS).watching(prompt):
            for _ in range(50):
                await asyncio.sleep(0)
        assert prompt.is_to_go_on
        return len(gangs.asked)

    assert asyncio.run(scenario()) == 2


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize("count", [1, 20])
def test_many_prompts_cost_as_many_calls_as_one(count: int) -> None:
    """One of each gang in each look; and each prompt leaves or stays for itself."""

    async def scenario() -> None:
        names = {str(number) for number in range(count)}
        short, long = Gangs([Standing(frozenset("0"), takes_others=True)]), Gangs([COULD])
        others = OtherGangs(TERMS)
        at_short, at_long = ([prompt_at(each, name) for name in names] for each in (short, long))
        with ExitStack() as watching:
            for prompt in at_short + at_long:
                watching.enter_context(others.watching(prompt))
            while not all(prompt.is_to_go_on for prompt in at_long):
                await asyncio.sleep(0)
        assert short.asked == long.asked == [names, names]
        assert {prompt.name for prompt in at_short if not prompt.is_to_go_on} == {"0"}

    asyncio.run(scenario())


@pytest.mark.usefixtures("at_once")
def test_whoever_comes_later_is_in_the_next_look() -> None:
    async def scenario() -> list[set[str]]:
        gangs, others = Gangs([COULD]), OtherGangs(TERMS)
        later = prompt_at(gangs, "later")
        with others.watching(prompt_at(gangs, "first")):
            while not gangs.asked:
                await asyncio.sleep(0)
            with others.watching(later):
                while not later.is_to_go_on:
                    await asyncio.sleep(0)
        return gangs.asked

    assert asyncio.run(scenario()) == [{"first"}, {"first", "later"}, {"later"}]


def test_a_deployment_that_hangs_makes_no_other_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_gangs, "_LOOK_SECONDS", 0.02)

    class Hanging(Gangs):
        async def results_async(self, timeout_s: float) -> list[Standing]:
            await asyncio.sleep(timeout_s)
            raise TimeoutError

    async def scenario() -> None:
        hanging, well = Hanging([COULD]), Gangs([COULD])
        others = OtherGangs(TERMS)
        stuck, prompt = prompt_at(hanging, "s"), prompt_at(well, "p")
        with others.watching(stuck), others.watching(prompt):
            async with asyncio.timeout(5):
                while not prompt.is_to_go_on:
                    await asyncio.sleep(0.001)
        assert not stuck.is_to_go_on
        assert len(hanging.asked) <= len(well.asked)

    asyncio.run(scenario())


@pytest.mark.usefixtures("at_once")
def test_nobody_asks_about_whoever_has_left() -> None:
    """And nothing goes on when the last one has; short prompts ask nobody."""

    async def scenario() -> list[set[str]]:
        gangs, others = Gangs([CANNOT]), OtherGangs(TERMS)
        with others.watching(prompt_at(gangs, "stays")):
            with others.watching(prompt_at(gangs, "leaves")):
                while not gangs.asked:
                    await asyncio.sleep(0)
            while len(gangs.asked) < 2:
                await asyncio.sleep(0)
        with others.watching(prompt_at(gangs, "short")):
            pass
        with others.watching(prompt_at(gangs, "the next")):
            while len(gangs.asked) < 3:
                await asyncio.sleep(0)
        await asyncio.sleep(0.01)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        return gangs.asked

    assert asyncio.run(scenario()) == [{"stays", "leaves"}, {"stays"}, {"the next"}]


@pytest.mark.usefixtures("at_once")
def test_an_error_that_nobody_expects_is_not_the_end_of_looking() -> None:
    async def scenario() -> bool:
        gangs, others = Gangs(ValueError("a mistake"), [COULD]), OtherGangs(TERMS)
        following = prompt_at(gangs, "following")
        with others.watching(prompt_at(gangs, "a")):
            while not gangs.asked:
                await asyncio.sleep(0)
            await asyncio.sleep(0.01)
            with others.watching(following):
                async with asyncio.timeout(5):
                    while not following.is_to_go_on:
                        await asyncio.sleep(0)
        return following.is_to_go_on

    assert asyncio.run(scenario())
