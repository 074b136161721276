"""A cluster whose vLLM spans two devices, here two processes on CPUs: `make test-vllm`.

What it answers is what a vLLM of one process answers.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import httpx
import pytest

from longreach.cluster.app import LocalCluster
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer

from ...cluster.conftest import (
    actor_pids,
    ask_body,
    make_prompt,
    scrape,
    wait_until_no_page_is_held,
)
from .clusters import http_of, started
from .streams import kill, streamed
from .test_cluster import MODEL, OWN

pytestmark = pytest.mark.live

PORT = 8545
LENGTHS = (600, 3000, 9000)
"""Computed by vLLM, and by a gang."""


def cluster_of(ranks: int) -> AbstractContextManager[LocalCluster]:
    return started(
        {
            "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
            "limits": {"max_model_len": 16384, "max_output_tokens": 1024, "max_choices": 4},
            "prefill": {
                "chunk_tokens": 2048, "kv_cache_tokens": 32768, "cpus_per_rank": 0.5,
            },
            "decode": {
                "engine": "vllm", "kv_cache_tokens": 32768, "cpus": 0.25, "max_batch": 4,
                "prefill_up_to": OWN, "tensor_parallel": ranks,
            },
            "ingress": {"port": PORT},
        }
    )  # fmt: skip


def answers(http: httpx.Client, tokenizer: Tokenizer) -> list[Any]:
    """To prompts of several lengths: greedy with log-probabilities, sampled, several choices."""
    said: list[Any] = []
    for tokens in LENGTHS:
        prompt = make_prompt(tokenizer, tokens)
        for fields in (
            {"logprobs": 3, "max_tokens": 12},
            {"temperature": 1.5, "seed": 5, "max_tokens": 24, "n": 3, "frequency_penalty": 0.5},
        ):
            body = ask_body(prompt, ignore_eos=True, **fields)
            answer = http.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            said.append(answer.json()["choices"])
    wait_until_no_page_is_held(http)
    return said


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def expected(tokenizer: Tokenizer) -> list[Any]:
    """What one rank answers."""
    with cluster_of(1) as alone, http_of(alone) as http:
        return answers(http, tokenizer)


@pytest.fixture(scope="module")
def http(expected: list[Any]) -> Iterator[httpx.Client]:
    """Of the cluster with two; one cluster at a time."""
    with cluster_of(2) as running, http_of(running) as made:
        assert len(actor_pids("DecodeFollower")) == 1
        yield made


def test_two_ranks_answer_as_one_does(
    http: httpx.Client, tokenizer: Tokenizer, expected: list[Any]
) -> None:
    for found, each in zip(answers(http, tokenizer), expected, strict=True):
        assert [choice["text"] for choice in found] == [choice["text"] for choice in each]
        for choice, other in zip(found, each, strict=True):
            if other["logprobs"] is not None:
                assert choice["logprobs"]["token_logprobs"] == pytest.approx(
                    other["logprobs"]["token_logprobs"], abs=2e-3
                )


def test_each_rank_takes_the_pages_of_its_own_heads(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    handed = ("longreach_handoff_bytes_total", "decode")
    before = scrape(http)[handed]
    assert http.post("/v1/completions", json=ask_body(make_prompt(tokenizer, 3000))).is_success
    # 24 pages of 5 layers, 2 heads, K and V, 128 tokens of 64 float32 values; all of them once.
    assert scrape(http)[handed] - before == 24 * 5 * 2 * 2 * 128 * 64 * 4


@pytest.mark.parametrize("whom", ["DecodeFollower", "DecodeWorker"])
def test_a_rank_that_dies_in_mid_answer_costs_a_pause(
    http: httpx.Client, tokenizer: Tokenizer, whom: str
) -> None:
    body = ask_body(
        make_prompt(tokenizer, 3000), max_tokens=300, temperature=1.2, seed=3, ignore_eos=True
    )
    calm = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert streamed(http, body, partial(kill, whom)) == calm
    wait_until_no_page_is_held(http, 30)
