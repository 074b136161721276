"""One cluster for all tests of this folder, in a process of its own: what `longreach serve` starts.

It has a gang for short prompts and one for long ones, and a decode worker of two ranks, which
computes the shortest ones itself.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import yaml

from longreach.cluster.readiness import is_ready
from longreach.engine.text.tokenizer import Tokenizer

from ...prometheus import free_port
from ..conftest import MODEL, actor_pids, ask_body, make_prompt, scrape, wait_for

OWN_LIMIT = 256
"""Tokens of the longest prompt that the decode worker computes itself."""
SHORT_LIMIT = 4096
CHUNK_TOKENS = 1024
DECODE_RANKS = ("DecodeWorker", "DecodeFollower")
"""Titles of the decode worker's processes."""
CONFIGURATION = {
    "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
    "limits": {
        "max_model_len": 65536,
        "max_output_tokens": 256,
        "max_choices": 2,
        "max_queued_requests": 1,
    },
    "prefill": [
        {
            "name": "short",
            "max_prompt_tokens": SHORT_LIMIT,
            "chunk_tokens": CHUNK_TOKENS,
            "kv_cache_tokens": 8192,
            "cpus_per_rank": 0.25,
        },
        {
            "name": "long",
            "chunk_tokens": CHUNK_TOKENS,
            "kv_cache_tokens": 65536,
            "cpus_per_rank": 0.25,
        },
    ],
    "decode": {
        "tensor_parallel": 2,
        "kv_cache_tokens": 131_072,
        "cpus": 0.25,
        "prefill_up_to": OWN_LIMIT,
    },
    "shutdown": {"drain_seconds": 30.0},
}
_SERVE = "from longreach.cluster.cli.main import main; main()"


@dataclass(frozen=True)
class Served:
    """A running `longreach serve`, and a client of its endpoint."""

    process: int
    http: httpx.Client
    tokenizer: Tokenizer

    def body(self, tokens: int, **fields: Any) -> dict[str, Any]:
        """Of a request about a prompt of so many tokens."""
        return ask_body(make_prompt(self.tokenizer, tokens), **fields)

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        return self.http.post("/v1/completions", json=body)

    def texts(self, body: dict[str, Any]) -> list[str]:
        """What each choice says."""
        answer = self.ask(body)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    @contextlib.contextmanager
    def streamed(self, body: dict[str, Any]) -> Iterator[Iterator[str]]:
        """What is said, piece by piece; the client leaves at the end of the block."""
        with self.http.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
            assert answer.status_code == 200
            yield _pieces(answer)

    def pids(self, actor: str) -> list[int]:
        return actor_pids(actor, self.process)

    def kill_gang(self, name: str) -> None:
        """End the replica that coordinates it, and with it the gang."""
        [pid] = self.pids(f"ServeReplica:longreach:prefill-{name}")
        os.kill(pid, signal.SIGKILL)

    def computed(self) -> dict[str, float]:
        """Prompt tokens that each gang has computed, and the decode worker itself."""
        name = "longreach_prefill_tokens_total"
        return {key[1]: value for key, value in scrape(self.http).items() if key[0] == name}

    def counted(self, name: str) -> float:
        """Of all roles together."""
        return sum(value for key, value in scrape(self.http).items() if key[0] == name)

    def waiting_for(self, gang: str) -> float:
        """Prompts that wait for it."""
        return scrape(self.http)[("longreach_num_requests_waiting", gang, "prefill")]

    def wait_until_ready(self) -> None:
        wait_for(lambda: self.http.get("/ready").status_code == 200, 120, "all is well")


def _pieces(answer: httpx.Response) -> Iterator[str]:
    for line in answer.iter_lines():
        if line.startswith("data: ") and line != "data: [DONE]":
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event, event
            yield "".join(choice["text"] for choice in event["choices"])


@pytest.fixture(scope="package")
def running(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Served]:
    port, folder = free_port(), tmp_path_factory.mktemp("served")
    configuration = {**CONFIGURATION, "ingress": {"port": port, "progress_seconds": 0.2}}
    path, log = folder / "cluster.yaml", folder / "log"
    path.write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}"
    with log.open("w") as said:
        serve = subprocess.Popen(
            [sys.executable, "-c", _SERVE, "serve", str(path)], stdout=said, stderr=said
        )
    try:
        with httpx.Client(base_url=url, timeout=180) as http:
            wait_for(lambda: is_ready(url) or serve.poll() is not None, 150, "that it is ready")
            assert serve.poll() is None, log.read_text()
            yield Served(serve.pid, http, tokenizer)
    finally:
        serve.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            serve.wait(60)
        serve.kill()


@pytest.fixture
def served(running: Served) -> Served:
    """When all of it is up."""
    running.wait_until_ready()
    return running
