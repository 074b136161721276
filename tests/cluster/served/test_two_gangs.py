"""A cluster with a gang for short prompts and one for long ones: who computes what, and who dies.

`longreach serve` runs it in a process of its own, because the other tests' cluster is in this one.
"""

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import httpx
import pytest
import yaml

from longreach.cluster.readiness import is_ready
from longreach.engine.text.tokenizer import Tokenizer

from ..prometheus import free_port
from .conftest import MODEL, actor_pids, ask_body, make_prompt, scrape, wait_for

OWN_LIMIT = 200
"""Tokens of the longest prompt that the decode worker computes itself."""
SHORT_LIMIT = 4096
LONG = 40_000
"""Tokens that take long enough for something to happen meanwhile."""
CONFIGURATION = {
    "model": {"path": "pocket", "name": MODEL},
    "limits": {
        "max_model_len": 65536,
        "max_output_tokens": 128,
        "max_choices": 1,
        "max_queued_requests": 1,
    },
    "prefill": [
        {
            "name": "short",
            "max_prompt_tokens": SHORT_LIMIT,
            "chunk_tokens": 1024,
            "kv_cache_tokens": 8192,
            "cpus_per_rank": 0.25,
        },
        {"name": "long", "chunk_tokens": 2048, "kv_cache_tokens": 65536, "cpus_per_rank": 0.25},
    ],
    "decode": {"kv_cache_tokens": 131_072, "cpus": 0.25, "prefill_up_to": OWN_LIMIT},
    "shutdown": {"drain_seconds": 30.0},
}
_SERVE = "from longreach.cluster.cli.main import main; main()"


@dataclass(frozen=True)
class Cluster:
    """A running `longreach serve`, and a client of its endpoint."""

    process: int
    http: httpx.Client
    tokenizer: Tokenizer

    def ask(self, tokens: int, timeout: float = 120) -> httpx.Response:
        body = ask_body(make_prompt(self.tokenizer, tokens), max_tokens=1)
        return self.http.post("/v1/completions", json=body, timeout=timeout)

    def computed(self) -> dict[str, float]:
        """Prompt tokens that each gang has computed, and the decode worker itself."""
        name = "longreach_prefill_tokens_total"
        return {key[1]: value for key, value in scrape(self.http).items() if key[0] == name}

    def waiting_for_long(self) -> float:
        """Prompts that wait for the long ones' gang."""
        return scrape(self.http)[("longreach_num_requests_waiting", "long", "prefill")]

    def is_ready(self) -> bool:
        return self.http.get("/ready").status_code == 200

    def kill(self, gang: str) -> None:
        """End the replica that coordinates a gang, and with it the gang."""
        (process,) = actor_pids(f"ServeReplica:longreach:prefill-{gang}", self.process)
        os.kill(process, signal.SIGKILL)

    def wait_until_ready(self) -> None:
        wait_for(self.is_ready, 120, "every gang is well")


@pytest.fixture(scope="module")
def two_gangs(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Cluster]:
    port = free_port()
    path = tmp_path_factory.mktemp("two gangs") / "cluster.yaml"
    path.write_text(yaml.safe_dump(CONFIGURATION | {"ingress": {"port": port}}))
    process = subprocess.Popen([sys.executable, "-c", _SERVE, "serve", str(path)])
    url = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_ready(url), 120, "the cluster is ready")
        with httpx.Client(base_url=url, timeout=120) as http:
            yield Cluster(process.pid, http, tokenizer)
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(90)


@pytest.fixture
def cluster_at_rest(two_gangs: Cluster) -> Cluster:
    two_gangs.wait_until_ready()
    return two_gangs


def test_each_prompt_is_computed_by_who_takes_its_length(cluster_at_rest: Cluster) -> None:
    before = cluster_at_rest.computed()
    for tokens in (10, OWN_LIMIT, OWN_LIMIT + 1, SHORT_LIMIT, SHORT_LIMIT + 1):
        assert cluster_at_rest.ask(tokens).status_code == 200
    after = cluster_at_rest.computed()
    grown = {gang: value - before.get(gang, 0) for gang, value in after.items()}
    assert grown == {
        "decode": 10 + OWN_LIMIT, "short": OWN_LIMIT + 1 + SHORT_LIMIT, "long": SHORT_LIMIT + 1,
    }  # fmt: skip


def begin_long(cluster: Cluster, pool: ThreadPoolExecutor) -> "Future[httpx.Response]":
    """Ask for a long prompt, and return when some of it has been computed."""
    before = cluster.computed().get("long", 0)
    answer = pool.submit(cluster.ask, LONG)
    wait_for(lambda: cluster.computed().get("long", 0) > before, 60, "a chunk of the long prompt")
    assert not answer.done()
    return answer


def test_the_end_of_the_long_prompts_gang_does_short_ones_no_harm(
    cluster_at_rest: Cluster,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = begin_long(cluster_at_rest, pool)
        cluster_at_rest.kill("long")
        while not long.done():
            assert cluster_at_rest.ask(1000).status_code == 200
        # It waited for the gang that takes the other's place.
        assert long.result().status_code == 200
    cluster_at_rest.wait_until_ready()


@pytest.mark.slow
def test_the_end_of_the_short_prompts_gang_does_a_long_one_no_harm(
    cluster_at_rest: Cluster,
) -> None:
    with ThreadPoolExecutor(1) as pool:
        long = begin_long(cluster_at_rest, pool)
        cluster_at_rest.kill("short")
        assert long.result().status_code == 200
    cluster_at_rest.wait_until_ready()
    assert cluster_at_rest.ask(1000).status_code == 200


def test_a_full_queue_of_long_prompts_is_none_of_short_ones(cluster_at_rest: Cluster) -> None:
    def wait_a_while() -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            cluster_at_rest.ask(LONG, timeout=5)

    with ThreadPoolExecutor(3) as pool:
        long = begin_long(cluster_at_rest, pool)
        for waiting in (1, 2):
            pool.submit(wait_a_while)
            wait_for(
                lambda n=waiting: cluster_at_rest.waiting_for_long() == n, 10, "one more waits"
            )
        assert cluster_at_rest.ask(LONG).status_code == 429
        assert cluster_at_rest.ask(1000).status_code == 200
        assert long.result().status_code == 200
