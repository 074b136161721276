"""Work that belongs to no request, and whose end is told."""

import asyncio
from contextvars import ContextVar

import pytest
from ray.exceptions import RayError

from longreach.cluster.tasks import as_nobody, detached, forever, tell

CALLER = ContextVar("CALLER", default="nobody")
"""Whose call something is, as Ray knows it: by a context variable."""


def test_calls_of_a_request_are_nobodys() -> None:
    async def run() -> list[str]:
        async def caller() -> str:
            return CALLER.get()

        CALLER.set("a request")
        assert CALLER.get() == "a request"
        told: list[str] = []
        tell(lambda: told.append(CALLER.get()))
        return [*told, as_nobody(CALLER.get), await detached(caller())]

    assert asyncio.run(run()) == ["nobody"] * 3


def test_whoever_cannot_be_told_is_gone() -> None:
    def call() -> None:
        raise RayError

    tell(call)


@pytest.mark.parametrize(
    ("end", "kind"),
    [
        ("raise", ZeroDivisionError),
        ("return", RuntimeError),
        ("be cancelled", asyncio.CancelledError),
    ],
)
def test_what_must_not_end_tells_how_it_ended(end: str, kind: type[BaseException]) -> None:
    failures: list[BaseException] = []

    async def work() -> None:
        if end == "raise":
            raise ZeroDivisionError
        if end == "be cancelled":
            await asyncio.sleep(10)

    async def run() -> None:
        task = forever(work(), failures.append)
        await asyncio.sleep(0)
        if end == "be cancelled":
            task.cancel()
        while not failures:
            await asyncio.sleep(0)

    asyncio.run(asyncio.wait_for(run(), 5))
    [failure] = failures
    assert type(failure) is kind
