"""nginx and HAProxy, by the examples, in front of two real clusters with the bundled model.

`make check-proxied-clusters` runs this; with ARGS=--record it writes the second table of
docs/behind-a-proxy.md. For the long prompt, each side may be silent for two seconds where the
examples have an hour.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import httpx
import pytest
from rich.console import Console

from longreach.cluster.cli.demo import DemoOptions, ask_for_hidden_key
from longreach.loadtest.chaos.cluster import Cluster, launched

from ..prometheus import free_port
from .proxies import PROXIES, proxy
from .table import Table

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "behind-a-proxy.md"
MODEL = "longreach-pocket"
SILENCE = "2s"
LONG_TOKENS = 65_536
CLIENTS = 3
"""Of each proxy while a cluster drains."""


@dataclass
class Setup:
    """Two clusters, and a folder for proxies in front of both."""

    clusters: list[Cluster]
    folder: Path
    seen: Table

    def proxy(self, name: str, silence: str | None = None) -> AbstractContextManager[str]:
        """The URL of one; see `proxies.proxy`."""
        ports = [each.config.values["ingress"]["port"] for each in self.clusters]
        return proxy(name, self.folder, ports, silence)


@pytest.fixture(scope="module")
def setup(tmp_path_factory: pytest.TempPathFactory, record: bool) -> Iterator[Setup]:
    folder = tmp_path_factory.mktemp("proxied")
    seen = Table(PAGE, PROXIES, "make check-proxied-clusters")
    with ExitStack() as running:
        clusters = [running.enter_context(small_cluster(free_port())) for _ in range(2)]
        yield Setup(clusters, folder, seen)
    if record:
        seen.write()


def small_cluster(port: int) -> AbstractContextManager[Cluster]:
    """One rank and one decode worker, for prompts of up to 131,072 tokens."""
    return launched(
        ROOT / "configs" / "laptop.yaml",
        {
            "limits": {"max_model_len": 131072, "max_output_tokens": 512},
            "prefill": {
                "sequence_parallel": 1, "chunk_tokens": 8192, "kv_cache_tokens": 131072,
                "cpus_per_rank": 0.2,
            },
            "decode": {"kv_cache_tokens": 196608, "threads": 1, "cpus": 0.2},
            "ingress": {"port": port},
            "shutdown": {"drain_seconds": 120},
        },
    )  # fmt: skip


def body(prompt: str, **fields: object) -> dict[str, object]:
    return {"model": MODEL, "prompt": prompt, **fields}


@pytest.mark.parametrize("name", PROXIES)
def test_a_long_prompt_is_answered_through_every_timeout(setup: Setup, name: str) -> None:
    options = DemoOptions(LONG_TOKENS, seed=11, depth=0.5)
    with setup.proxy(name, SILENCE) as url:
        report = ask_for_hidden_key(url, options, 0, Console(file=StringIO()))
    assert report.correct, report.answer
    assert report.time_to_first_token > 2, "longer than the timeouts"
    setup.seen.put(
        f"a needle in {LONG_TOKENS:,} tokens, streamed, every idle timeout at two seconds",
        name,
        f"the right answer, its first token after {report.time_to_first_token:.0f} s",
    )


@pytest.mark.parametrize("name", PROXIES)
def test_who_leaves_frees_all_pages(setup: Setup, name: str) -> None:
    asked = body("word " * 20_000, stream=True)
    with (
        setup.proxy(name) as url,
        httpx.stream("POST", f"{url}/v1/completions", json=asked, timeout=60) as answer,
    ):
        lines = answer.iter_lines()  # the connection is closed with it
        next(lines)
        wait_for(lambda: any(each.leaked_pages(0) for each in setup.clusters), 30)
        answer.close()
        left = time.monotonic()
        assert [each.leaked_pages(30) for each in setup.clusters] == [0, 0]
    setup.seen.put(
        "a client that leaves while its prompt is computed",
        name,
        f"no page is held {time.monotonic() - left:.1f} s later",
    )


def test_a_cluster_that_ends_under_load_loses_no_request(setup: Setup) -> None:
    """The last test: of two clusters one is left."""
    draining, other = setup.clusters
    enough = threading.Event()
    statuses: dict[str, list[int]] = {name: [] for name in PROXIES}

    def client(name: str, url: str) -> None:
        fields = body("word " * 700, max_tokens=32, min_tokens=32)
        while not enough.is_set():
            answer = httpx.post(f"{url}/v1/completions", json=fields, timeout=120)
            statuses[name].append(answer.status_code)

    with ExitStack() as running, ThreadPoolExecutor(CLIENTS * len(PROXIES)) as pool:
        urls = {name: running.enter_context(setup.proxy(name)) for name in PROXIES}
        clients = [pool.submit(client, *each) for each in urls.items() for _ in range(CLIENTS)]
        try:
            wait_for(lambda: all(len(each) >= CLIENTS for each in statuses.values()), 120)
            os.kill(draining.tree.serve.pid, signal.SIGTERM)
            assert draining.wait_for_end(150) == 0
            ended = {name: len(each) for name, each in statuses.items()}
            more = 2 * CLIENTS
            wait_for(lambda: all(len(statuses[n]) >= ended[n] + more for n in PROXIES), 120)
        finally:
            enough.set()
        for each in clients:
            each.result()
    for name in PROXIES:
        assert set(statuses[name]) == {200}, name
        setup.seen.put(
            f"{CLIENTS} clients all the time, one of the clusters gets SIGTERM",
            name,
            f"{len(statuses[name])} requests, all answered; the cluster ended with status 0",
        )
    assert other.leaked_pages(30) == 0


def wait_for(happened: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.1)
