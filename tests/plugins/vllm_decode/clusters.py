"""Clusters of these tests, each started and ended in this process."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import httpx

from longreach.cluster.app import LocalCluster, start
from longreach.cluster.settings import parse_settings


@contextmanager
def started(settings: Mapping[str, Any]) -> Iterator[LocalCluster]:
    """A cluster that is ready, with settings as a file has them; nothing of it is left."""
    running = start(parse_settings(settings))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


def http_of(cluster: LocalCluster) -> httpx.Client:
    return httpx.Client(base_url=cluster.url, timeout=240)
