"""A cluster that lives as long as a `with` block, and ends cleanly however the block ends."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console

from ..settings import Settings, warnings_about


@dataclass(frozen=True)
class RunningCluster:
    """A cluster that is ready at `url`, and the seconds that it took to get there."""

    url: str
    seconds_to_ready: float


@contextmanager
def running_cluster(settings: Settings, console: Console) -> Iterator[RunningCluster]:
    """Start a cluster, wait until it is ready, and stop it at the end of the block."""
    from ..app import start

    # Asked to end politely by a supervisor, do as at Ctrl-C, to which background jobs start deaf.
    for request_to_end in (signal.SIGTERM, signal.SIGINT):
        signal.signal(request_to_end, signal.default_int_handler)
    started = time.monotonic()
    for warning in warnings_about(settings):
        console.print(f"warning: {warning}", style="bold yellow", highlight=False)
    console.print("starting the cluster")
    cluster = start(settings)
    try:
        cluster.wait_until_ready()
        seconds = time.monotonic() - started
        console.print(f"ready after {seconds:.1f} s at {cluster.url}")
        yield RunningCluster(cluster.url, seconds)
    finally:
        console.print("stopping the cluster")
        cluster.stop()


def wait_for_interrupt() -> None:
    """Return at Ctrl-C or SIGTERM."""
    try:
        signal.pause()
    except KeyboardInterrupt:
        return
