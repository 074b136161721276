"""What scrapes are answered with: the figures of all processes that wrote into one folder."""

import fcntl
from collections.abc import Iterable
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector

from .sheet import lock

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4


def render(directory: Path) -> bytes:
    """What every process has written to the folder so far, as Prometheus's text (CONTENT_TYPE)."""
    registry = CollectorRegistry()
    registry.register(FolderCollector(directory))
    return generate_latest(registry)


class FolderCollector(Collector):
    """Reads a folder and all below it anew at every scrape."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def collect(self) -> Iterable[Family]:
        _forget_gauges_of_the_dead(self._directory)
        files = [str(path) for path in sorted(self._directory.rglob("*.db"))]
        return sorted(MultiProcessCollector.merge(files), key=lambda family: family.name)


def _forget_gauges_of_the_dead(directory: Path) -> None:
    for path in directory.rglob("gauge_*.db"):
        try:
            # Shared: of two scrapes at once, each must see that nobody holds the file.
            handle = lock(path, fcntl.LOCK_SH)
        except FileNotFoundError:
            continue  # another scrape was faster
        if handle is not None:
            handle.close()
            path.unlink(missing_ok=True)
