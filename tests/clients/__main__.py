"""Points every client of the suite at a cluster with the bundled model, and writes a page of it.

make test-clients
make test-clients ARGS=--quick
python -m tests.clients --only openai-python
"""

import argparse
import math
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import httpx
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.app import start
from longreach.cluster.settings import Settings, parse_settings
from longreach.loadtest.commit import commit

from .suite import SUITE, Client, Target

MODEL = "longreach-pocket"
PAGE = Path(__file__).parents[2] / "docs" / "clients.md"
BEGIN, END = "<!-- table: make test-clients -->\n", "<!-- end of table -->\n"
RUN_SECONDS = 300
INSTALLED_AT_ONCE = 2
SLOWEST_HEALTH_SECONDS = 0.25
FREED_SECONDS = 15


@dataclass(frozen=True)
class Row:
    """What came of one client."""

    client: Client
    version: str
    verdict: str

    @property
    def line(self) -> str:
        """Of the table."""
        return f"| {self.client.name} | {self.version} | {self.client.ran} | {self.verdict} |"


@dataclass(frozen=True)
class Wait:
    """How long `/health` took, in seconds, and a server that does nothing at the same moment.

    `beside` is the client that ran. Where there was no answer, or an error, it took forever.
    """

    beside: str
    seconds: float
    idle_seconds: float

    @property
    def is_late(self) -> bool:
        """Whether it was late by itself, and not because every process waited for a core."""
        return self.seconds - self.idle_seconds > SLOWEST_HEALTH_SECONDS

    def __str__(self) -> str:
        return (
            f"{1000 * self.seconds:.0f} ms beside {self.beside}, when a server that does nothing "
            f"took {1000 * self.idle_seconds:.0f}"
        )


class Health:
    """Asks `/health` all the time, and a server that does nothing, to know the machine's part."""

    def __init__(self, url: str, idle_port: int) -> None:
        self.waits: list[Wait] = []
        self.beside = "none"
        self._urls = f"{url}/health", f"http://127.0.0.1:{idle_port}/"
        self._idle = [sys.executable, "-m", "http.server", str(idle_port), "--bind", "127.0.0.1"]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._ask, daemon=True)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within the block."""
        quiet = subprocess.DEVNULL
        with (
            TemporaryDirectory() as empty,
            subprocess.Popen(self._idle, cwd=empty, stdout=quiet, stderr=quiet) as idle,
        ):
            self._thread.start()
            try:
                yield
            finally:
                self._over.set()
                self._thread.join()
                idle.terminate()

    def _ask(self) -> None:
        with httpx.Client(timeout=30) as http, ThreadPoolExecutor(2) as both:
            while not self._over.wait(0.2):
                seconds, idle_seconds = both.map(partial(_seconds, http), self._urls)
                self.waits.append(Wait(self.beside, seconds, idle_seconds))

    def __str__(self) -> str:
        waits = [wait.seconds for wait in self.waits]
        slowest = sorted(self.waits, key=lambda wait: wait.seconds)[-3:]
        late = sum(seconds > SLOWEST_HEALTH_SECONDS for seconds in waits)
        return (
            f"`/health` was asked {len(waits)} times: median {1000 * statistics.median(waits):.1f} "
            f"ms, {late} later than {1000 * SLOWEST_HEALTH_SECONDS:.0f} ms, of which "
            f"{sum(wait.is_late for wait in self.waits)} by more than that server; the slowest: "
            + "; ".join(str(wait) for wait in reversed(slowest))
        )


def _seconds(http: httpx.Client, url: str) -> float:
    started = time.monotonic()
    try:
        http.get(url).raise_for_status()
    except httpx.HTTPError:
        return math.inf
    return time.monotonic() - started


def settings_for(port: int, page_port: int) -> Settings:
    """A small cluster, whose endpoint a page of another origin may use."""
    return parse_settings(
        {
            "model": {"path": "pocket", "name": MODEL},
            "limits": {"max_model_len": 32768, "max_output_tokens": 512},
            "prefill": {"chunk_tokens": 2048, "kv_cache_tokens": 65536, "cpus_per_rank": 0.5},
            "decode": {"kv_cache_tokens": 65536, "cpus": 0.5},
            "ingress": {"port": port, "allowed_origins": [f"http://127.0.0.1:{page_port}"]},
        }
    )


def install(client: Client, environments: Path) -> str | None:
    """Make a client's environment where there is none; what keeps it from being made, or None."""
    folder = folder_of(client, environments)
    stamp, wanted = folder / ".installed", "\n".join(client.packages)
    problem = client.missing()
    if problem is not None or (stamp.exists() and stamp.read_text(encoding="utf-8") == wanted):
        return problem
    started = time.monotonic()
    try:
        client.install(folder)
    except (subprocess.SubprocessError, OSError) as error:
        return f"not installed: {' '.join(str(error).split())[:120]}"
    stamp.write_text(wanted, encoding="utf-8")
    print(f"{client.name}: installed ({time.monotonic() - started:.0f} s)", flush=True)
    return None


def install_all(chosen: list[Client], environments: Path) -> list[str | None]:
    """What `install` says of each. Before anything is measured, because it takes the machine."""
    with ThreadPoolExecutor(INSTALLED_AT_ONCE) as installing:
        return [*installing.map(install, chosen, [environments] * len(chosen))]


def folder_of(client: Client, environments: Path) -> Path:
    return environments / client.name.lower().replace(" ", "-")


def run(client: Client, problem: str | None, environments: Path, target: Target) -> Row:
    """Run a client; what it said goes into a log beside its environment."""
    if problem is not None:
        return Row(client, "", f"not run: {problem}")
    folder = folder_of(client, environments)
    log = folder / "log.txt"
    started = time.monotonic()
    with log.open("w", encoding="utf-8") as out:
        try:
            done = subprocess.run(
                client.command(folder, target), stdout=out, stderr=subprocess.STDOUT,
                timeout=RUN_SECONDS, check=False,
            )  # fmt: skip
            verdict = "works" if done.returncode == 0 else _failures(log)
        except subprocess.TimeoutExpired:
            verdict = f"not done after {RUN_SECONDS} s"
    print(f"{client.name}: {verdict} ({time.monotonic() - started:.0f} s; {log})", flush=True)
    return Row(client, client.version(folder), verdict)


def _failures(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    named = [line.removeprefix("FAILED ") for line in lines if line.startswith("FAILED ")]
    return f"fails: {', '.join(named) or 'see its log'}"


def pages_held(url: str) -> float:
    """The largest share of pages in use, once it had time to become none."""
    held = 1.0
    deadline = time.monotonic() + FREED_SECONDS
    while held and time.monotonic() < deadline:
        text = httpx.get(f"{url}/metrics").text
        held = max(
            sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name == "longreach_kv_cache_usage_perc"
        )
        time.sleep(0.2)
    return held


def write_page(rows: list[Row], beside: str) -> None:
    """Put the table, and what was seen beside it, where the last ones stand."""
    text = PAGE.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    after = rest.split(END)[1]
    table = ["| client | version | what was run | verdict |", "| --- | --- | --- | --- |"]
    table += [row.line for row in rows]
    page = f"{before}{BEGIN}\n{beside}\n\n" + "\n".join(table) + f"\n\n{END}{after}"
    PAGE.write_text(page, encoding="utf-8")


def main() -> int:
    """The status: 0 where every client that could be run works."""
    parser = argparse.ArgumentParser(prog="python -m tests.clients", description=__doc__)
    parser.add_argument("--environments", type=Path, default=Path(".clients"))
    names = [client.name for client in SUITE]
    parser.add_argument("--only", action="append", choices=names, metavar="NAME",
                        help=f"one of {', '.join(names)}; repeatable")  # fmt: skip
    parser.add_argument("--quick", action="store_true", help="only what CI runs")
    parser.add_argument("--port", type=int, default=8900, help="and the next two")
    options = parser.parse_args()
    chosen = [
        client
        for client in SUITE
        if (options.only is None or client.name in options.only)
        and (client.quick or not options.quick)
    ]
    is_whole = len(chosen) == len(SUITE)
    environments = options.environments.resolve()
    began = time.monotonic()
    problems = install_all(chosen, environments)
    installed = time.monotonic()
    busy = os.getloadavg()[0]
    cluster = start(settings_for(options.port, options.port + 1))
    try:
        cluster.wait_until_ready()
        health = Health(cluster.url, options.port + 2)
        target = Target(f"{cluster.url}/v1", MODEL, options.port + 1)
        with health.watched():
            rows = []
            for client, problem in zip(chosen, problems, strict=True):
                health.beside = client.name
                rows.append(run(client, problem, environments, target))
        held = pages_held(cluster.url)
    finally:
        cluster.kill()
    beside = (
        f"Last run: {time.strftime('%Y-%m-%d')}, commit {commit()}, Python "
        f"{platform.python_version()}, {time.monotonic() - installed:.0f} s, and "
        f"{installed - began:.0f} s before that for environments that were not there; before it, "
        f"{busy:.1f} processes wanted to run on {os.cpu_count()} cores. {health}. "
        f"Pages held after all: {'none' if held == 0 else f'{held:.1%}'}."
    )
    print(beside)
    if is_whole:
        write_page(rows, beside)
    works = all(row.verdict == "works" or row.verdict.startswith("not run") for row in rows)
    # Of the whole suite: a few may be tried on a machine that does something else as well.
    slow = is_whole and any(wait.is_late for wait in health.waits)
    return 0 if works and held == 0 and not slow else 1


if __name__ == "__main__":
    sys.exit(main())
