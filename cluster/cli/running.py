"""A cluster that lives as long as a `with` block, and ends cleanly however the block ends."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from rich.console import Console

from ..settings import Settings, warnings_about

if TYPE_CHECKING:
    from ..app import LocalCluster

_LOST_SECONDS = 30.0
_POLL_SECONDS = 0.5


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that is ready at `url`, and the seconds that it took to get there."""

    url: str
    seconds_to_ready: float


class _Cluster(Protocol):
    """Of this machine alone, or on a Ray that runs already."""

    @property
    def url(self) -> str: ...

    def wait_until_ready(self) -> None: ...

    def stop(self) -> None: ...

    def kill(self) -> None: ...


@contextmanager
def running_cluster(
    settings: Settings, console: Console, address: str | None = None
) -> Iterator[RunningCluster]:
    """Start a cluster, wait until it is ready, and stop it at the end of the block.

    Args:
        address: of a Ray cluster that runs already and stays; None for one of this machine alone.

    Raises:
        ClusterLostError: Ray or its endpoint broke down meanwhile. The block is interrupted then
            by a KeyboardInterrupt, and no process is left.
    """
    from ..app import ClusterLostError

    end_politely()
    started = time.monotonic()
    loss = _Loss()
    try:
        cluster = _start(settings, console, address, loss)
        try:
            yield _ready(cluster, started, console)
        finally:
            _end(cluster, loss, console)
    except BaseException as error:
        if loss.problem is None:
            raise
        raise ClusterLostError(loss.sentence) from error
    finally:
        loss.handled.set()
    if loss.problem is not None:
        raise ClusterLostError(loss.sentence)


def deploy_detached(settings: Settings, console: Console, address: str) -> None:
    """Deploy on a Ray cluster that runs already, and leave when the endpoint is ready."""
    from ..deployed import deploy_at

    end_politely()
    started = time.monotonic()
    cluster = deploy_at(address, settings)
    try:
        _ready(cluster, started, console)
    finally:
        cluster.leave()


def end_politely() -> None:
    """Asked to end by a supervisor, do as at Ctrl-C, to which background jobs start deaf."""
    for request_to_end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request_to_end, signal.default_int_handler)


def _start(settings: Settings, console: Console, address: str | None, loss: "_Loss") -> _Cluster:
    if address is not None:
        from ..deployed import deploy_at

        return deploy_at(address, settings)
    from ..app import start

    for warning in warnings_about(settings):
        console.print(f"warning: {warning}", style="bold yellow", highlight=False)
    console.print("starting the cluster")
    return start(settings, loss.report)


def _ready(cluster: _Cluster, started: float, console: Console) -> RunningCluster:
    """Wait until it is, and say so."""
    cluster.wait_until_ready()
    seconds = time.monotonic() - started
    console.print(f"ready after {seconds:.1f} s at {cluster.url}")
    return RunningCluster(cluster.url, seconds)


def _end(cluster: _Cluster, loss: "_Loss", console: Console) -> None:
    if loss.problem is not None:
        cluster.kill()
        return
    console.print("stopping the cluster")
    cluster.stop()


class _Loss:
    """Interrupts the main thread when the cluster is lost, and ends the process if that is deaf."""

    def __init__(self) -> None:
        self.problem: str | None = None
        self.handled = threading.Event()

    @property
    def sentence(self) -> str:
        """For the user."""
        return f"the cluster was lost: {self.problem}; see Ray's logs, and start it again"

    def report(self, cluster: "LocalCluster", problem: str) -> None:
        """See `LocalCluster.watch`."""
        self.problem = problem
        os.kill(os.getpid(), signal.SIGINT)
        if not self.handled.wait(_LOST_SECONDS):
            # The main thread waits in Ray for somebody who is no more, and nothing wakes it.
            cluster.abandon()
            print(f"longreach: {self.sentence}", file=sys.stderr, flush=True)
            os._exit(1)


def wait_for_interrupt() -> None:
    """Return at Ctrl-C or SIGTERM."""
    try:
        # `signal.pause` would miss one that comes just before it.
        while True:
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        return
