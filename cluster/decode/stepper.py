"""Steps of the decode engine, one after the other while there is something to generate."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from ...engine.decode.contract import DecodeEngine, Output
from ..pulse import Pulse
from ..tasks import forever


class Stepper:
    """Steps on a thread of its own, and takes turns on the engine with everybody else.

    Args:
        engine: that steps.
        turn: held by whoever uses the engine.
        pulse: counts each step as a piece of work.
        deliver: is given what came out of a step, and the seconds that it took.
        on_failure: called when a step failed in a way that leaves the engine's state unknown;
            there are no steps after it.
        set_up: called once on the thread.
    """

    def __init__(
        self,
        engine: DecodeEngine,
        turn: asyncio.Lock,
        pulse: Pulse,
        deliver: Callable[[list[Output], float], None],
        on_failure: Callable[[BaseException], None],
        set_up: Callable[[], None],
    ) -> None:
        self._engine, self._turn, self._pulse, self._deliver = engine, turn, pulse, deliver
        self._thread = ThreadPoolExecutor(1, "step", set_up)
        self._work = asyncio.Event()
        self._task = forever(self._run(), on_failure)

    def wake(self) -> None:
        """There may be something to generate."""
        self._work.set()

    async def _run(self) -> None:
        while True:
            await self._work.wait()
            async with self._turn:
                if not self._engine.has_work:
                    self._work.clear()
                    continue
                started = time.perf_counter()
                loop = asyncio.get_running_loop()
                outputs = await loop.run_in_executor(self._thread, self._step)
                self._deliver(outputs, time.perf_counter() - started)

    def _step(self) -> list[Output]:
        with self._pulse.piece():
            return self._engine.step()
