"""Waiting for what gloo exchanges, as it ends at whatever moment."""

import threading
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch.distributed as dist

from longreach.engine.errors import LeftMeshError
from longreach.engine.parallel.communicator import Communicator


class Exchanged:
    """A collective that ends while its third wait runs out of time.

    Args:
        failure: why it fails then, if it does.
        on_wait: called in each wait.
    """

    def __init__(
        self, failure: str | None = None, on_wait: Callable[[int], None] = lambda wait: None
    ) -> None:
        self.failure, self.on_wait, self.waits = failure, on_wait, 0

    def is_completed(self) -> bool:
        return self.waits >= 3

    def wait(self, timeout: object = None) -> bool:
        if self.is_completed():
            if self.failure is not None:
                raise RuntimeError(self.failure)
            return True
        self.waits += 1
        self.on_wait(self.waits)
        raise RuntimeError("Operation timed out!")


def wait_for(work: Exchanged, left: threading.Event | None = None) -> None:
    communicator = Communicator(cast(Any, None), left or threading.Event(), on_host=True)
    communicator._run(lambda waits: cast(dist.Work, work))


def test_what_ends_as_a_wait_runs_out_of_time_has_not_failed() -> None:
    work = Exchanged()
    wait_for(work)
    assert work.waits == 3


def test_what_failed_says_so() -> None:
    with pytest.raises(RuntimeError, match="a peer died"):
        wait_for(Exchanged("a peer died"))


def test_a_mesh_that_is_left_is_waited_for_no_longer() -> None:
    left = threading.Event()
    work = Exchanged(on_wait=lambda wait: left.set() if wait == 2 else None)
    with pytest.raises(LeftMeshError):
        wait_for(work, left)
    assert work.waits == 2
