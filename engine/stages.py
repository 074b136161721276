"""Where the time of a prefill chunk goes, by stage.

On a GPU stages are timed on its stream, and nothing waits for them before they are read: the host
runs ahead of the device, so its clock would time launches. What lies in no stage is a launch gap.
"""

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch


class Stages(ABC):
    """Adds up seconds by stage. Stages do not lie within each other."""

    @staticmethod
    def on(device: torch.device) -> "Stages":
        """Stages of work on this device."""
        return DeviceStages() if device.type == "cuda" else HostStages()

    @abstractmethod
    def time(self, stage: str) -> AbstractContextManager[None]:
        """Count what is done inside, or launched inside, to a stage."""

    @abstractmethod
    def seconds(self) -> dict[str, float]:
        """Seconds of every stage so far; returns when its work is done."""


class HostStages(Stages):
    """By the host's clock: for CPUs, whose operations have ended when they return."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        try:
            yield
        finally:
            self._seconds[stage] += time.perf_counter() - started

    def seconds(self) -> dict[str, float]:
        return dict(self._seconds)


class DeviceStages(Stages):
    """By events on the current CUDA stream."""

    def __init__(self) -> None:
        self._seconds: defaultdict[str, float] = defaultdict(float)
        self._unread: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def time(self, stage: str) -> Iterator[None]:
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        yield
        ended.record()
        self._unread.append((stage, started, ended))

    def seconds(self) -> dict[str, float]:
        for stage, started, ended in self._unread:
            ended.synchronize()
            self._seconds[stage] += started.elapsed_time(ended) / 1000
        self._unread.clear()
        return dict(self._seconds)


class Untimed(Stages):
    """Times nothing: for decoding, where a step is timed as a whole."""

    def time(self, stage: str) -> AbstractContextManager[None]:
        return nullcontext()

    def seconds(self) -> dict[str, float]:
        return {}


UNTIMED = Untimed()
