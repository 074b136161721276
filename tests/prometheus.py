"""A real Prometheus server for tests, from Debian's package of that name."""

import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest


@contextmanager
def prometheus_server(
    folder: Path, jobs: Mapping[str, Sequence[str]], milliseconds: int = 200
) -> Iterator[str]:
    """Scrape each job's targets (host:port) every so often; gives the server's URL.

    Skips the test where there is no such server.
    """
    binary = shutil.which("prometheus")
    if binary is None:
        pytest.skip("no prometheus server here; Debian's package `prometheus` has one")
    config = folder / "prometheus.yml"
    every = f"{milliseconds}ms"
    scraped = [
        {"job_name": name, "static_configs": [{"targets": list(targets)}]}
        for name, targets in jobs.items()
    ]
    settings = {"global": {"scrape_interval": every, "scrape_timeout": every}}
    # JSON is YAML.
    config.write_text(json.dumps({**settings, "scrape_configs": scraped}))
    address = f"127.0.0.1:{free_port()}"
    server = subprocess.Popen(
        [
            binary,
            f"--config.file={config}",
            f"--storage.tsdb.path={folder / 'series'}",
            f"--web.listen-address={address}",
            "--log.level=error",
        ]
    )
    try:
        yield f"http://{address}"
    finally:
        server.terminate()
        server.wait(timeout=30)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def query(prometheus_url: str, expression: str) -> float | None:
    """The value of the first series, or None when there is none yet."""
    arguments = urllib.parse.urlencode({"query": expression})
    try:
        with urllib.request.urlopen(f"{prometheus_url}/api/v1/query?{arguments}") as answer:
            result = json.load(answer)["data"]["result"]
    except urllib.error.URLError:
        return None  # it is still starting
    return float(result[0]["value"][1]) if result else None


def wait_for_value(prometheus_url: str, expression: str, expected: float) -> None:
    """Return when a query has this answer; fail after half a minute."""
    deadline = time.monotonic() + 30
    value = None
    while time.monotonic() < deadline:
        value = query(prometheus_url, expression)
        if value == pytest.approx(expected):
            return
        time.sleep(0.1)
    raise AssertionError(f"{expression} is {value}, not {expected}")
