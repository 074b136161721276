"""A Ray cluster of several nodes on this machine, as `ray start` makes one on several."""

import os
import secrets
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

from ..prometheus import free_port

_READY_SECONDS = 180.0
_END_SECONDS = 5.0
_BIN = Path(sys.executable).parent


@dataclass(frozen=True)
class RayCluster:
    """`address` of the GCS, `dashboard` for `serve deploy`; commands need the environment.

    `scraped`: host and port of each node's figures of Ray's own, the head's first.
    """

    address: str
    dashboard: str
    environment: Mapping[str, str]
    scraped: tuple[str, ...]

    def run(self, *command: str, seconds: float = 120) -> str:
        """What a command of this environment's says; it must succeed."""
        done = subprocess.run(
            [str(_BIN / command[0]), *command[1:]],
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=seconds,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def serve_status(self) -> dict[str, Any]:
        """Of each application by its name, as the dashboard has it for `serve status`."""
        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        answer = httpx.get(
            f"{self.dashboard}/api/serve/applications/",
            headers={"Authorization": f"Bearer {token}"},
            timeout=60,
        )
        return answer.raise_for_status().json()["applications"]


@contextmanager
def ray_cluster(workers: int, cpus: int) -> Iterator[RayCluster]:
    """A head without CPUs, as on Kubernetes, and so many workers with so many each.

    It asks for a token of its own. Nothing of it is left at the end of the block.
    """
    with tempfile.TemporaryDirectory(prefix="lr-") as name, ExitStack() as nodes:
        folder = Path(name)
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
        gcs, dashboard = free_port(), free_port()
        figures = [free_port() for _ in range(workers + 1)]
        nodes.enter_context(
            _node(
                environment,
                folder / "head.log",
                figures[0],
                "--head",
                f"--port={gcs}",
                f"--dashboard-port={dashboard}",
                "--dashboard-host=127.0.0.1",
                f"--temp-dir={folder / 'ray'}",
                "--num-cpus=0",
                f"--ray-client-server-port={free_port()}",
            )
        )
        cluster = RayCluster(
            f"127.0.0.1:{gcs}",
            f"http://127.0.0.1:{dashboard}",
            environment,
            tuple(f"127.0.0.1:{port}" for port in figures),
        )
        _wait_until_it_answers(f"{cluster.dashboard}/api/gcs_healthz", folder / "head.log")
        for number in range(workers):
            nodes.enter_context(
                _node(
                    environment,
                    folder / f"worker-{number}.log",
                    figures[number + 1],
                    f"--address={cluster.address}",
                    f"--num-cpus={cpus}",
                )
            )
        yield cluster


@contextmanager
def _node(environment: Mapping[str, str], log: Path, figures: int, *options: str) -> Iterator[None]:
    """`ray start`, which ends its processes when it is ended. `figures`: port of Ray's own."""
    command = [
        str(_BIN / "ray"), "start", "--block", "--node-ip-address=127.0.0.1",
        "--disable-usage-stats", "--object-store-memory=200000000", "--min-worker-port=0",
        "--max-worker-port=0",
        f"--dashboard-agent-listen-port={free_port()}", f"--metrics-export-port={figures}",
        *options,
    ]  # fmt: skip
    node = _started(command, {**os.environ, **environment}, log)
    try:
        yield
    finally:
        _end(node.pid)
        node.wait()


def _end(pid: int) -> None:
    """A node and all that it started: what does not go by itself is killed."""
    node = psutil.Process(pid)
    processes = [*node.children(recursive=True), node]
    node.terminate()
    for left in psutil.wait_procs(processes, _END_SECONDS)[1]:
        with suppress(psutil.NoSuchProcess):
            left.kill()


def _started(
    command: list[str], environment: Mapping[str, str], log: Path
) -> "subprocess.Popen[bytes]":
    """A node that has joined. On a busy machine Ray gives up after half a minute: then again."""
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        with log.open("wb") as said:
            node = subprocess.Popen(command, env=environment, stdout=said, stderr=said)
        while node.poll() is None and "--block" not in log.read_text():
            time.sleep(0.2)
        if node.poll() is None:
            return node
    raise AssertionError(f"no node after {_READY_SECONDS:g} s: {log.read_text()[-2000:]}")


def _wait_until_it_answers(url: str, log: Path) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while time.monotonic() < deadline:
        try:
            with urllib.request.urlopen(url, timeout=2):
                return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise AssertionError(f"no Ray after {_READY_SECONDS:g} s: {log.read_text()[-2000:]}")
