"""Threads and the stream on which vLLM was loaded; there is no GPU here, so it is a name."""

from threading import Thread, local

import pytest
import torch

from longreach.plugins.vllm_decode.one_stream import OneStream


class Streams:
    """PyTorch's: each thread has one of its own."""

    def __init__(self) -> None:
        self._own = local()

    def set(self, stream: str) -> None:
        self._own.stream = stream

    def current(self, device: object = None) -> str:
        return getattr(self._own, "stream", "the default")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.cuda, "current_stream", made.current)
    monkeypatch.setattr(torch.cuda, "set_stream", made.set)
    return made


def in_a_thread_that_steps(one: OneStream, streams: Streams) -> list[str]:
    """Its streams, before it takes that one and after."""
    had: list[str] = []

    def step() -> None:
        had.append(streams.current())
        one.take()
        had.append(streams.current())

    thread = Thread(target=step)
    thread.start()
    thread.join()
    return had


def test_another_thread_steps_on_the_stream_of_the_one_that_loads(streams: Streams) -> None:
    streams.set("vLLM's")
    one = OneStream(torch.device("cuda"))
    assert in_a_thread_that_steps(one, streams) == ["the default", "vLLM's"]


def test_on_a_cpu_there_are_none(streams: Streams) -> None:
    streams.set("some")
    one = OneStream(torch.device("cpu"))
    assert in_a_thread_that_steps(one, streams) == ["the default", "the default"]
