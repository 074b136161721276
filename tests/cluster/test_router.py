"""Which gang computes a prompt, and whether all of them are well, over handles that only answer."""

import asyncio
from typing import Any, cast

import pytest

from longreach.cluster.router import PrefillRouter
from longreach.engine.errors import UnavailableError


class FakeHandle:
    """Serve's handle of a deployment: its calls are `handle.method.remote(...)`."""

    def __init__(self, well: bool = True) -> None:
        self.asked = 0
        self._well = well
        self.check_health = self

    def options(self, *, stream: bool) -> "FakeHandle":
        assert stream
        return self

    def remote(self) -> Any:
        return self._answer()

    async def _answer(self) -> None:
        self.asked += 1
        if not self._well:
            raise UnavailableError("a rank died")


def make_router(*handles: FakeHandle) -> PrefillRouter:
    return PrefillRouter(cast(Any, zip((1000, 50_000, 131_072), handles, strict=True)))


@pytest.mark.parametrize(
    ("tokens", "gang"),
    [(1, 0), (1000, 0), (1001, 1), (50_000, 1), (50_001, 2), (131_072, 2)],
)
def test_a_prompt_goes_to_the_first_gang_that_takes_its_length(tokens: int, gang: int) -> None:
    handles = [FakeHandle(), FakeHandle(), FakeHandle()]
    assert make_router(*handles).gang_for(tokens) is cast(Any, handles[gang])


def test_gangs_are_well_when_each_is() -> None:
    handles = [FakeHandle(), FakeHandle(), FakeHandle()]
    asyncio.run(make_router(*handles).check_health())
    assert [handle.asked for handle in handles] == [1, 1, 1]
    with pytest.raises(UnavailableError):
        asyncio.run(make_router(FakeHandle(), FakeHandle(well=False), FakeHandle()).check_health())
