"""Autoscaling for real: decode replicas of one cluster go from one to two and back, under load.

`make check-autoscaling` runs this.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import httpx
import pytest
from ray import serve

from longreach.cluster.app import APP_NAME, LocalCluster, start
from longreach.cluster.settings import Settings, parse_settings

from ..prometheus import free_port

pytestmark = pytest.mark.live

MODEL = "longreach-pocket"
PROMPT = "word " * 1200
"""Of 6,000 tokens: with its answer, more than a third of a decode replica's pages."""
ANSWER_TOKENS = 768
CLIENTS = 4


def settings(port: int) -> Settings:
    """Room for two requests at a time in a decode replica, and short delays."""
    return parse_settings(
        {
            "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
            "limits": {
                "max_model_len": 16384, "max_output_tokens": ANSWER_TOKENS, "max_choices": 1,
            },
            "prefill": {"chunk_tokens": 4096, "kv_cache_tokens": 32768, "cpus_per_rank": 0.2},
            "decode": {"kv_cache_tokens": 19456, "cpus": 0.2, "max_replicas": 2},
            "autoscaling": {"up_seconds": 1, "down_seconds": 5},
            "ingress": {"port": port},
            "shutdown": {"drain_seconds": 120},
        }
    )  # fmt: skip


@pytest.fixture
def cluster() -> Iterator[LocalCluster]:
    running = start(settings(free_port()))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


def replicas() -> int:
    """Of decode, that serve."""
    deployments = serve.status().applications[APP_NAME].deployments
    states = {str(state): count for state, count in deployments["decode"].replica_states.items()}
    return states.get("RUNNING", 0)


def wait_for(what: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, f"{replicas()} decode replicas"
        time.sleep(0.5)


def test_decode_replicas_come_with_the_load_and_go_with_it(cluster: LocalCluster) -> None:
    enough = threading.Event()
    finished: list[tuple[int, int]] = []

    def client() -> None:
        while not enough.is_set():
            finished.append(ask(cluster.url))

    with ThreadPoolExecutor(CLIENTS) as pool:
        clients: list[Future[None]] = [pool.submit(client) for _ in range(CLIENTS)]
        try:
            assert replicas() == 1
            wait_for(lambda: replicas() == 2, 240)
            served = len(finished)
            wait_for(lambda: len(finished) >= served + 2 * CLIENTS, 300)
            assert replicas() == 2, "as long as the load lasts"
        finally:
            enough.set()
        for each in clients:
            each.result()
    wait_for(lambda: replicas() == 1, 240)
    assert set(finished) == {(200, ANSWER_TOKENS)}
    assert ask(cluster.url) == (200, ANSWER_TOKENS)


def ask(url: str) -> tuple[int, int]:
    """The status, and the tokens of the whole answer."""
    body = {
        "model": MODEL,
        "prompt": PROMPT,
        "max_tokens": ANSWER_TOKENS,
        "min_tokens": ANSWER_TOKENS,
    }
    answer = httpx.post(f"{url}/v1/completions", json=body, timeout=300)
    return answer.status_code, answer.json().get("usage", {}).get("completion_tokens", 0)
