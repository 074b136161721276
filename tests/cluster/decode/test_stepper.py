"""Steps follow each other on their thread, and whoever wants the engine gets it in between."""

import asyncio
import threading
from collections.abc import Callable
from typing import Any, cast

import pytest

from longreach.cluster.decode.stepper import Stepped, Stepper, Turn
from longreach.cluster.pulse import Pulse
from longreach.engine.decode.contract import DecodeEngine
from longreach.engine.messages import Delta


class Engine:
    """Generates a token a step for each request, until it has as many as were asked for."""

    def __init__(self, **requests: int) -> None:
        self.left = dict(requests)
        self.steps = 0
        self.before_step: Callable[[], None] = lambda: None

    @property
    def has_work(self) -> bool:
        return bool(self.left)

    def is_generating(self, request_id: str) -> bool:
        return request_id in self.left

    def step(self) -> list[Any]:
        self.before_step()
        self.steps += 1
        outputs = [(name, Delta(0, str(self.steps))) for name in self.left]
        self.left = {name: left - 1 for name, left in self.left.items() if left > 1}
        return outputs


class Stage:
    def __init__(self, engine: Engine) -> None:
        self.delivered: list[Stepped] = []
        self.failures: list[BaseException] = []
        self.turn = Turn()
        self.deliver = self.delivered.append
        self.stepper = Stepper(
            cast(DecodeEngine, engine), self.turn, Pulse(), lambda each: self.deliver(each),
            self.failures.append, lambda: None,
        )  # fmt: skip


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def run(scenario: Any) -> None:
    asyncio.run(asyncio.wait_for(scenario, 30))


def test_every_step_is_handed_out_in_order_with_what_was_over_then() -> None:
    async def scenario() -> None:
        stage = Stage(engine := Engine(a=2, b=3))
        stage.stepper.wake()
        await until(lambda: len(stage.delivered) == 3)
        assert engine.steps == 3
        assert [[name for name, _ in each.outputs] for each in stage.delivered] == [
            ["a", "b"], ["a", "b"], ["b"],
        ]  # fmt: skip
        assert [each.over for each in stage.delivered] == [set(), {"a"}, {"b"}]
        assert stage.failures == []

    run(scenario())


def test_a_step_does_not_wait_until_the_one_before_is_handed_out() -> None:
    async def scenario() -> None:
        stage = Stage(engine := Engine(a=3))
        second = threading.Event()
        engine.before_step = lambda: second.set() if engine.steps == 1 else None
        # This blocks the event loop, which the second step must not need.
        stage.deliver = lambda each: stage.delivered.append(each) if second.wait(20) else None
        stage.stepper.wake()
        await until(lambda: len(stage.delivered) == 3)

    run(scenario())


def test_whoever_wants_the_engine_gets_it_after_the_step_under_way() -> None:
    async def scenario() -> None:
        stage = Stage(engine := Engine(a=1_000_000))
        first, goes_on = threading.Event(), threading.Event()

        def wait() -> None:
            first.set()
            assert goes_on.wait(20)

        engine.before_step = wait
        stage.stepper.wake()
        await until(first.is_set)
        wanting = asyncio.create_task(stage.turn.acquire())
        await asyncio.sleep(0)
        assert stage.turn.is_wanted
        goes_on.set()
        await wanting
        assert engine.steps == 1
        # What came out before is handed out before.
        assert len(stage.delivered) == 1
        engine.left = {"a": 1}
        stage.turn.release()
        await until(lambda: len(stage.delivered) == 2)

    run(scenario())


@pytest.mark.parametrize("where", ["step", "delivery"])
def test_a_failure_is_told(where: str) -> None:
    async def scenario() -> None:
        stage = Stage(engine := Engine(a=1))

        def fail(*ignored: object) -> None:
            raise RuntimeError("broken")

        if where == "step":
            engine.before_step = fail
        else:
            stage.deliver = fail
        stage.stepper.wake()
        await until(lambda: bool(stage.failures))
        assert str(stage.failures[0]) == "broken"

    run(scenario())
