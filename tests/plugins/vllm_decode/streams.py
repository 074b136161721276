"""Streams of completions, and what is done to a cluster in the middle of one."""

import json
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from ...cluster.conftest import actor_pids

SECONDS = 240
ENOUGH = 20
"""Characters after which a stream is in its middle."""


@contextmanager
def events_of(http: httpx.Client, body: dict[str, Any]) -> Iterator[Iterator[Any]]:
    """The events of a stream, errors among them, but for the last that only says that it ends."""
    streaming = {**body, "stream": True}
    with http.stream("POST", "/v1/completions", json=streaming, timeout=SECONDS) as response:
        lines = (line for line in response.iter_lines() if line.startswith("data: {"))
        yield (json.loads(line.removeprefix("data: ")) for line in lines)


def text_of(event: Any) -> str:
    """What an event adds."""
    return "".join(choice["text"] for choice in event["choices"])


def streamed(http: httpx.Client, body: dict[str, Any], in_the_middle: Callable[[], None]) -> str:
    """A stream's text; something is done once some of it is there."""
    text, done = "", False
    with events_of(http, body) as events:
        for event in events:
            assert "error" not in event, event
            text += text_of(event)
            if len(text) > ENOUGH and not done:
                done = True
                in_the_middle()
    assert done
    return text


def kill(actor: str) -> None:
    """The one process of an actor, as if its machine had lost it."""
    [pid] = actor_pids(actor)
    os.kill(pid, signal.SIGKILL)
