"""Steps of the decode engine, one after the other while there is something to generate.

They follow each other on a thread of its own without a word to the event loop, which hands out
what came out of one during the next. Whoever else wants the engine gets it after the step under
way.
"""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from ..pulse import Pulse
from ..tasks import forever

if TYPE_CHECKING:
    from ...engine.decode.contract import DecodeEngine, Output


class Turn(asyncio.Lock):
    """Held by whoever uses the engine, in the order in which they came."""

    def __init__(self) -> None:
        super().__init__()
        self._wanting = 0

    @property
    def is_wanted(self) -> bool:
        """Whether somebody waits for it. May be asked by any thread."""
        return self._wanting > 0

    async def acquire(self) -> Literal[True]:
        self._wanting += 1
        try:
            return await super().acquire()
        finally:
            self._wanting -= 1


@dataclass(frozen=True)
class Stepped:
    """What came out of a step, which requests were over with it, its end, and its seconds.

    `ended` is `time.time()`. The seconds are those since the last step of which something came out,
    or since the first of several of which nothing did.
    """

    outputs: "list[Output]"
    over: frozenset[str]
    ended: float
    seconds: float


def are_over(engine: "DecodeEngine", outputs: "list[Output]") -> frozenset[str]:
    """The requests of these outputs, the engine's last ones, that generate nothing more."""
    names = {request_id for request_id, _ in outputs}
    return frozenset(name for name in names if not engine.is_generating(name))


class Stepper:
    """Steps on a thread of its own, and takes turns on the engine with everybody else.

    Args:
        engine: that steps.
        turn: held by whoever uses the engine.
        pulse: counts each step as a piece of work.
        deliver: is given what came out of a step, perhaps while the next is under way.
        on_failure: called when a step or a delivery failed in a way that leaves the engine's state
            unknown; there are no steps after it.
        set_up: called once on the thread.
    """

    def __init__(
        self,
        engine: "DecodeEngine",
        turn: Turn,
        pulse: Pulse,
        deliver: Callable[[Stepped], None],
        on_failure: Callable[[BaseException], None],
        set_up: Callable[[], None],
    ) -> None:
        self._engine, self._turn, self._pulse = engine, turn, pulse
        self._deliver, self._on_failure = deliver, on_failure
        self._thread = ThreadPoolExecutor(1, "step", set_up)
        self._work = asyncio.Event()
        self._began: float | None = None
        self._task = forever(self._run(), on_failure)

    def wake(self) -> None:
        """There may be something to generate."""
        self._work.set()

    async def _run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await self._work.wait()
            async with self._turn:
                if not self._engine.has_work:
                    self._work.clear()
                    continue
                await loop.run_in_executor(self._thread, self._steps, loop)

    def _steps(self, loop: asyncio.AbstractEventLoop) -> None:
        """Step until there is nothing to generate, or somebody wants the turn."""
        while True:
            began = time.perf_counter() if self._began is None else self._began
            with self._pulse.piece():
                outputs = self._engine.step()
            ended, seconds = time.time(), time.perf_counter() - began
            # What was launched only comes out of the next.
            self._began = began if self._engine.has_work and not outputs else None
            stepped = Stepped(outputs, are_over(self._engine, outputs), ended, seconds)
            # Before the turn ends, since what is called from here is called in order.
            loop.call_soon_threadsafe(self._hand_out, stepped)
            if self._turn.is_wanted or not self._engine.has_work:
                return

    def _hand_out(self, stepped: Stepped) -> None:
        try:
            self._deliver(stepped)
        except Exception as error:
            self._on_failure(error)
