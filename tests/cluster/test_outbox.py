"""Calls that arrive, whatever becomes of whom they are made for."""

import asyncio
from contextvars import ContextVar

from longreach.cluster.outbox import Outbox

CALLER = ContextVar("CALLER", default="nobody")


def test_calls_are_nobodys_come_in_order_and_outlive_their_sender_and_each_other() -> None:
    made: list[tuple[int, str]] = []

    def fail() -> None:
        raise ValueError("no such actor")

    async def run() -> None:
        outbox = Outbox()

        async def request() -> None:
            CALLER.set("a request")
            try:
                await asyncio.sleep(10)
            finally:
                outbox.send(lambda: made.append((1, CALLER.get())))
                outbox.send(fail)
                outbox.send(lambda: made.append((2, CALLER.get())))

        leaving = asyncio.create_task(request())
        await asyncio.sleep(0)
        leaving.cancel()
        while len(made) < 2:
            await asyncio.sleep(0.001)

    asyncio.run(asyncio.wait_for(run(), 5))
    assert made == [(1, "nobody"), (2, "nobody")]
