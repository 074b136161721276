"""A decode worker of two ranks, from outside: what one says, and what a rank's death costs.

`longreach serve` runs it in a process of its own, because the other tests' cluster is in this one.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
import torch
import yaml

from longreach.cluster.readiness import is_ready
from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.kv.pages import PagePool
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters, Tokens
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer

from ..prometheus import free_port
from .conftest import (
    MODEL,
    actor_pids,
    ask_body,
    make_prompt,
    scrape,
    wait_for,
    wait_until_no_page_is_held,
)

OWN_LIMIT, CHUNK = 256, 1024
RANKS = ("DecodeWorker", "DecodeFollower")
CONFIGURATION = {
    "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
    "limits": {"max_model_len": 32768, "max_output_tokens": 256, "max_choices": 2},
    "prefill": {"chunk_tokens": CHUNK, "kv_cache_tokens": 65536, "cpus_per_rank": 0.25},
    "decode": {
        "tensor_parallel": 2,
        "kv_cache_tokens": 65536,
        "cpus": 0.25,
        "prefill_up_to": OWN_LIMIT,
    },
    "shutdown": {"drain_seconds": 30.0},
}
_SERVE = "from longreach.cluster.cli.main import main; main()"


@dataclass(frozen=True)
class Cluster:
    """A running `longreach serve`, and a client of its endpoint."""

    process: int
    http: httpx.Client
    tokenizer: Tokenizer

    def prompt(self, tokens: int) -> Tokens:
        return make_prompt(self.tokenizer, tokens)

    def ask(self, body: dict[str, Any]) -> list[str]:
        """The text of each choice."""
        answer = self.http.post("/v1/completions", json=body, timeout=180)
        assert answer.status_code == 200, answer.text
        return [choice["text"] for choice in answer.json()["choices"]]

    def stream(self, body: dict[str, Any]) -> Iterator[str]:
        """What is said, piece by piece."""
        with self.http.stream(
            "POST", "/v1/completions", json={**body, "stream": True}, timeout=180
        ) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: ") and line != "data: [DONE]":
                    event = json.loads(line.removeprefix("data: "))
                    assert "error" not in event, event
                    yield "".join(choice["text"] for choice in event["choices"])

    def pids(self, actor: str) -> list[int]:
        return actor_pids(actor, self.process)

    def counted(self, name: str) -> float:
        return sum(value for key, value in scrape(self.http).items() if key[0] == name)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Iterator[Cluster]:
    port, folder = free_port(), tmp_path_factory.mktemp("spanning")
    configuration = {**CONFIGURATION, "ingress": {"port": port}}
    path = folder / "cluster.yaml"
    path.write_text(yaml.safe_dump(configuration))
    url = f"http://127.0.0.1:{port}"
    with (folder / "log").open("w") as log:
        serve = subprocess.Popen(
            [sys.executable, "-c", _SERVE, "serve", str(path)], stdout=log, stderr=log
        )
    try:
        with httpx.Client(base_url=url) as http:
            wait_for(lambda: is_ready(url) or serve.poll() is not None, 150, "that it is ready")
            assert serve.poll() is None, (folder / "log").read_text()
            yield Cluster(serve.pid, http, tokenizer)
    finally:
        serve.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            serve.wait(60)
        serve.kill()


def answer_of_one(prompt: Tokens, **sampling: Any) -> list[str]:
    """The text of each choice, from one process."""
    local = LocalPrefill(CHECKPOINT, max_tokens=8192)
    pool = PagePool(local.pool.geometry, 128, torch.device("cpu"))
    decoder = Decoder(local.model, pool, TokenBytes(Tokenizer(CHECKPOINT).raw), 4)
    parameters = SamplingParameters(ignore_eos=True, **sampling)
    decoder.reserve(GenerationRequest("a", prompt, parameters, 0.0))
    local.prefiller.admit("a", prompt)
    hand_off, logits = DirectHandOff(decoder, "a"), None
    for start in range(0, len(prompt), CHUNK):
        end = min(start + CHUNK, len(prompt))
        logits = local.prefiller.run_chunk("a", start, end, hand_off).logits
    assert logits is not None
    outputs = decoder.start("a", logits.numpy())
    while decoder.has_work:
        outputs += decoder.step()
    texts = [""] * parameters.choices
    for _, delta in outputs:
        assert isinstance(delta, Delta)
        texts[delta.choice] += delta.text
    return texts


@pytest.mark.parametrize("tokens", [1, 201, 3001])
def test_two_ranks_say_what_one_says(cluster: Cluster, tokens: int) -> None:
    """A prompt of the worker's own, and one that comes from a gang; greedy, and two choices."""
    prompt = cluster.prompt(tokens)
    said = cluster.ask(ask_body(prompt, max_tokens=24, ignore_eos=True))
    assert said == answer_of_one(prompt, max_tokens=24, temperature=0.0)
    drawn = {"temperature": 0.8, "seed": 3, "max_tokens": 12}
    said = cluster.ask(ask_body(prompt, ignore_eos=True, n=2, **drawn))
    assert said == answer_of_one(prompt, choices=2, **drawn)
    assert [len(cluster.pids(actor)) for actor in RANKS] == [1, 1]
    wait_until_no_page_is_held(cluster.http)


@pytest.mark.slow
def test_a_gang_that_dies_has_its_pages_back_from_both_ranks(cluster: Cluster) -> None:
    body = ask_body(cluster.prompt(14_000), max_tokens=8, ignore_eos=True)
    before, back = (
        cluster.counted(f"longreach_prefill_tokens_{each}") for each in ("total", "back_total")
    )
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(cluster.ask, body)
        wait_for(
            lambda: cluster.counted("longreach_prefill_tokens_total") - before >= 4 * CHUNK,
            60, "four chunks",
        )  # fmt: skip
        [rank] = cluster.pids("PrefillRank")
        os.kill(rank, signal.SIGKILL)
        said = asked.result()
    assert cluster.counted("longreach_prefill_tokens_back_total") - back >= 2 * CHUNK
    assert cluster.ask(body) == said
    wait_until_no_page_is_held(cluster.http)


@pytest.mark.slow
@pytest.mark.parametrize("actor", RANKS)
def test_a_rank_that_dies_in_mid_answer_costs_a_pause(cluster: Cluster, actor: str) -> None:
    """It takes the other along; both are replaced, and the text is as if nothing had happened."""
    body = ask_body(cluster.prompt(3001), max_tokens=120, ignore_eos=True)
    undisturbed = cluster.ask(body)
    before = [cluster.pids(each) for each in RANKS]
    said, killed = "", False
    for piece in cluster.stream(body):
        said += piece
        if len(said) > 20 and not killed:
            killed = True
            [pid] = cluster.pids(actor)
            os.kill(pid, signal.SIGKILL)
    assert killed
    assert [said] == undisturbed
    wait_for(lambda: cluster.http.get("/ready").status_code == 200, 60, "that it is ready")
    after = [cluster.pids(each) for each in RANKS]
    assert [len(each) for each in after] == [1, 1]
    assert not {*before[0], *before[1]} & {*after[0], *after[1]}
    wait_until_no_page_is_held(cluster.http)
