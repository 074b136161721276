"""When a prompt is to leave a gang that was asked to go."""

import asyncio
from collections.abc import Iterator
from itertools import chain, repeat
from typing import Any, cast

import pytest
from ray.serve.exceptions import RayServeException

from longreach.cluster.decode import other_gangs
from longreach.cluster.decode.other_gangs import OtherGangs
from longreach.cluster.messages import PrefillOrder, Standing
from longreach.cluster.settings import HandOffTerms, ModelSettings
from longreach.engine.messages import GenerationRequest

TERMS = HandOffTerms(ModelSettings(path="pocket", name="a model"), "object_store")
ORDER = PrefillOrder(
    cast(Any, GenerationRequest("a", cast(Any, None), cast(Any, None), 0.0)),
    destination=cast(Any, None),
    released=cast(Any, None),
    terms=TERMS,
)
HAS_IT, COULD, CANNOT = Standing.HAS_IT, Standing.COULD_TAKE_IT, Standing.CANNOT
Said = list[Standing] | Exception


class Gangs:
    """A deployment's handle: what all gangs on Serve's list say, time after time."""

    def __init__(self, *said: Said) -> None:
        self._said: Iterator[Said] = chain(said, repeat(said[-1]))
        self.asked = 0

    def broadcast(self, method: str, name: str, terms: HandOffTerms) -> "Gangs":
        assert (method, name, terms) == ("standing", "a", TERMS)
        self.asked += 1
        return self

    async def results_async(self, timeout_s: float) -> list[Standing]:
        said = next(self._said)
        if isinstance(said, Exception):
            raise said
        return said


async def after(gangs: Gangs, looks: int) -> bool:
    others = OtherGangs(cast(Any, gangs), ORDER)
    others.look()
    while gangs.asked < looks and not others.are_to_go_on:
        await asyncio.sleep(0)
    others.close()
    await asyncio.sleep(0)
    return others.are_to_go_on


@pytest.mark.parametrize(
    ("said", "goes_on"),
    [
        ([[COULD]], True),
        ([[COULD, CANNOT]], True),
        ([[HAS_IT, COULD]], False),
        ([[CANNOT]], False),  # another configuration's
        ([[]], False),
        ([RayServeException("none is up")], False),
        ([TimeoutError()], False),
        # Serve's list may have been late once.
        ([[COULD], [HAS_IT, COULD], [COULD], [HAS_IT, COULD]], False),
    ],
)
def test_a_prompt_leaves_where_only_others_are_on_the_list(
    monkeypatch: pytest.MonkeyPatch, said: list[Said], goes_on: bool
) -> None:
    monkeypatch.setattr(other_gangs, "_LOOK_SECONDS", 0.0)
    assert asyncio.run(after(Gangs(*said), looks=8)) is goes_on


def test_short_prompts_ask_nobody() -> None:
    async def scenario() -> int:
        gangs = Gangs([COULD])
        others = OtherGangs(cast(Any, gangs), ORDER)
        others.close()  # before anybody looked
        others.look()
        await asyncio.sleep(0.01)
        others.close()
        return gangs.asked

    assert asyncio.run(scenario()) == 0
