"""Work beside computing: collectives, which occupy links rather than multiprocessors.

On a GPU it is launched on a stream of its own, one for each axis of the mesh: all collectives of a
communicator are on one stream, in the order in which they were begun. On a CPU it is done at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Generic, TypeVar

import torch

Result = TypeVar("Result")


@dataclass(frozen=True, eq=False)
class Pending(Generic[Result]):
    """Something begun. Whoever began it must wait before its inputs or its results are let go of.

    `done` happens on a GPU when it is; `kept` are its inputs.
    """

    result: Result
    done: torch.cuda.Event | None = None
    kept: object = None

    def wait(self) -> Result:
        """The result, for whatever is launched from now on; the host waits for nothing."""
        if self.done is not None:
            torch.cuda.current_stream().wait_event(self.done)
        return self.result


def aside(work: Callable[[], Result], device: torch.device, axis: str) -> Pending[Result]:
    """Begin work that needs what is launched so far, and that nothing launched later needs.

    Args:
        work: launches it, and allocates nothing that outlives it.
    """
    if device.type != "cuda":
        return Pending(work())
    stream = _stream(device, axis)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        result, done = work(), torch.cuda.Event()
        done.record(stream)
        return Pending(result, done, work)


@cache
def _stream(device: torch.device, axis: str) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
