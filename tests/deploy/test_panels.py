"""Every panel on a real Prometheus that scraped a real cluster, under load and idle.

`make check-dashboards` runs this; with ARGS=--record it draws the pictures in the pages.
"""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from longreach.cluster.metrics.exporter import export
from longreach.deploy.dashboards.boards import BOARDS
from longreach.deploy.dashboards.panels import Source
from longreach.deploy.dashboards.prometheus import Prometheus, QueryError, Span
from longreach.deploy.dashboards.shown import VARIABLES, problems, shown

from ..prometheus import free_port, prometheus_server
from .deployment import HEADERS, MODEL, Deployment, deployed_overlay

pytestmark = pytest.mark.live

PICTURES = Path(__file__).parents[2] / "docs" / "figures" / "dashboards"
SCRAPE_MILLISECONDS = 1000
WINDOW, WINDOW_SECONDS = "10s", 10
IDLE_SECONDS = 25
"""Until no rate remembers the load."""
SHORT, LONG = "word " * 100, "word " * 6000
SOURCES: tuple[Source, ...] = ("longreach", "ray")
"""There is no GPU here, and so nothing of DCGM's."""


@contextmanager
def watched(deployment: Deployment, folder: Path) -> Iterator[str]:
    """A Prometheus that scrapes an exporter and Ray on each node."""
    with ExitStack() as exporters:
        targets = []
        for node in deployment.figures.iterdir():
            server, thread = export(node, "127.0.0.1", port := free_port())
            exporters.callback(thread.join)
            exporters.callback(server.shutdown)
            targets.append(f"127.0.0.1:{port}")
        jobs = {"longreach": targets, "ray": deployment.ray.scraped}
        with prometheus_server(folder, jobs, SCRAPE_MILLISECONDS) as url:
            yield url


class Load:
    """Clients of each kind until they are told that it is enough; their answers' statuses."""

    def __init__(self, deployment: Deployment) -> None:
        self.statuses: list[int] = []
        self._deployment = deployment
        self._enough = threading.Event()
        kinds = (self._short, self._short, self._long, self._leaves)
        self._threads = [threading.Thread(target=kind, daemon=True) for kind in kinds]

    def start(self) -> None:
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        self._enough.set()
        for thread in self._threads:
            thread.join(120)
            assert not thread.is_alive()

    def _short(self) -> None:
        while not self._enough.wait(0.1):
            answer = self._deployment.ask(SHORT, max_tokens=32, min_tokens=32)
            self.statuses.append(answer.status_code)

    def _long(self) -> None:
        while not self._enough.wait(0.5):
            self.statuses.append(self._deployment.ask(LONG, max_tokens=64).status_code)

    def _leaves(self) -> None:
        body = {"model": MODEL, "prompt": LONG, "stream": True}
        url = f"{self._deployment.url}/v1/completions"
        while not self._enough.wait(5):
            with httpx.stream("POST", url, json=body, headers=HEADERS, timeout=60) as answer:
                self.statuses.append(answer.status_code)
                next(answer.iter_lines())


def kill_a_worker() -> None:
    """Of decode, among the processes that this one started."""
    for process in psutil.Process().children(recursive=True):
        if process.name().startswith("ray::DecodeWork"):
            os.kill(process.pid, signal.SIGKILL)
            return
    raise AssertionError("no decode worker lives")


def wait_for(seconds: float, prometheus: Prometheus, began: float) -> list[str]:
    """What is wrong with the panels, until nothing is or time is over."""
    deadline = time.monotonic() + seconds
    while True:
        found = list(problems(prometheus, Span(began, time.time(), 1.0), SOURCES))
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(1)


def test_every_panel_shows_something_under_load_and_no_nonsense_when_idle(
    tmp_path: Path, record: bool
) -> None:
    pictures = PICTURES if record else tmp_path / "pictures"
    with deployed_overlay(tmp_path) as deployment, watched(deployment, tmp_path) as url:
        prometheus = Prometheus(url, WINDOW, VARIABLES)
        began = time.time()
        load = Load(deployment)
        load.start()
        try:
            assert wait_for(60, prometheus, began) == []
            kill_a_worker()
            time.sleep(20)
        finally:
            load.stop()
        assert set(load.statuses) == {200}, "a killed worker's requests are begun again"
        time.sleep(IDLE_SECONDS)
        whole = Span(began, time.time(), 1.0)
        assert list(problems(prometheus, whole, SOURCES, pictures)) == []
        assert all((pictures / f"{board.name}.png").stat().st_size > 10_000 for board in BOARDS)
        check_what_was_seen(prometheus, whole)


def check_what_was_seen(prometheus: Prometheus, span: Span) -> None:
    """A worker was lost, its requests were begun again, clients left; at last nothing was done."""
    last = {
        panel.panel.title: {curve.name: curve.series.values for curve in panel.curves}
        for board in BOARDS
        for panel in shown(prometheus, board, span)
    }
    assert max(last["Requests begun again"]["again"]) > 0
    assert max(last["Requests that clients cancelled"]["cancelled"]) > 0
    assert max(last["Gangs and decode workers lost, an hour"]["decode"]) > 0
    assert max(last["Requests by outcome"]["success"]) > 0
    assert last["Requests by outcome"]["success"][-1] == 0
    assert last["Share that failed by the cluster's fault"]["failed"][-1] == 0
    assert last["Nodes that are scraped"]["up"][-1] == 2
    with pytest.raises(QueryError):
        prometheus.over("sum(", span)
