"""A cluster for the length of a block; in its place one that notes what it is told."""

import io
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

import pytest
from rich.console import Console

from longreach.cluster import app
from longreach.cluster.app import ClusterLostError, OnLost
from longreach.cluster.cli.running import running_cluster, wait_for_interrupt
from longreach.cluster.settings import Settings

from ..conftest import make_settings

_HANDLED = (signal.SIGINT, signal.SIGTERM)


class FakeCluster:
    url = "http://127.0.0.1:1"

    def __init__(self, on_lost: OnLost) -> None:
        self.on_lost = on_lost
        self.calls: list[str] = []

    def wait_until_ready(self) -> None:
        self.calls.append("wait_until_ready")

    def stop(self) -> None:
        self.calls.append("stop")

    def kill(self) -> None:
        self.calls.append("kill")

    def lose(self) -> None:
        """From another thread, in a moment, as the watch does."""
        told = threading.Timer(0.2, self.on_lost, (self, "the raylet ended"))
        told.daemon = True
        told.start()


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[FakeCluster]:
    clusters: list[FakeCluster] = []

    def start(settings: Settings, on_lost: OnLost) -> FakeCluster:
        clusters.append(FakeCluster(on_lost))
        return clusters[-1]

    monkeypatch.setattr(app, "start", start)
    return clusters


@pytest.mark.parametrize("number", _HANDLED)
def test_asked_to_end_it_stops_in_order(made: list[FakeCluster], number: signal.Signals) -> None:
    with running_cluster(make_settings(1), Console(file=io.StringIO())) as cluster:
        assert cluster.url == FakeCluster.url
        threading.Timer(0.2, os.kill, (os.getpid(), number)).start()
        wait_for_interrupt()
    assert made[0].calls == ["wait_until_ready", "stop"]


@pytest.mark.parametrize("wait", [wait_for_interrupt, lambda: time.sleep(30)])
def test_a_lost_cluster_is_killed_and_not_drained(
    made: list[FakeCluster], wait: Callable[[], None]
) -> None:
    """Whether the block waits to be interrupted, or is busy with something else."""

    def run() -> None:
        with running_cluster(make_settings(1), Console(file=io.StringIO())):
            made[0].lose()
            wait()

    began = time.monotonic()
    with pytest.raises(ClusterLostError) as lost:
        run()
    assert "the raylet ended" in str(lost.value)
    assert made[0].calls == ["wait_until_ready", "kill"]
    assert time.monotonic() - began < 10


def test_a_cluster_that_is_lost_while_it_drains_is_told(
    made: list[FakeCluster], monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(cluster: FakeCluster) -> None:
        cluster.lose()
        time.sleep(30)

    def run() -> None:
        with running_cluster(make_settings(1), Console(file=io.StringIO())):
            assert made

    monkeypatch.setattr(FakeCluster, "stop", stop)
    with pytest.raises(ClusterLostError):
        run()


def test_the_process_ends_even_if_the_main_thread_hears_nothing() -> None:
    program = (
        "import signal, threading, time\n"
        "from longreach.cluster.cli import running\n"
        "running._LOST_SECONDS = 0.5\n"
        "class Cluster:\n"
        "    def abandon(self):\n"
        "        print('abandoned', flush=True)\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "loss = running._Loss()\n"
        "threading.Thread(target=loss.report, args=(Cluster(), 'the raylet ended')).start()\n"
        "time.sleep(60)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30
    )
    assert (done.returncode, done.stdout) == (1, "abandoned\n")
    assert "the raylet ended" in done.stderr
