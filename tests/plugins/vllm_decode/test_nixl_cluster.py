"""Pages that vLLM's process reads by NIXL into its own blocks, and a gang out of them.

In a cluster on a CPU: `make test-vllm`.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import httpx
import pytest

from longreach.cluster.app import LocalCluster
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.evaluation.tasks import NEEDLES

from ...cluster.conftest import (
    actor_pids,
    ask_body,
    make_prompt,
    scrape,
    wait_for,
    wait_until_no_page_is_held,
)
from .clusters import http_of, started
from .streams import kill
from .test_cluster import MODEL, OWN, needle

pytestmark = pytest.mark.live

PORT, CHUNK_TOKENS = 8550, 2048
TOKENS = 9000
LONG = 20_000
"""Tokens that take long enough to be interrupted."""


def cluster_with(transport: str) -> AbstractContextManager[LocalCluster]:
    return started(
        {
            "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
            "limits": {"max_model_len": 32768, "max_output_tokens": 64, "max_choices": 4},
            "prefill": {
                "chunk_tokens": CHUNK_TOKENS, "kv_cache_tokens": 32768, "cpus_per_rank": 0.5,
            },
            "decode": {
                "engine": "vllm", "kv_cache_tokens": 49152, "cpus": 0.5, "max_batch": 4,
                "prefill_up_to": OWN,
            },
            "transport": {"kind": transport},
            "ingress": {"port": PORT},
        }
    )  # fmt: skip


def has_nixl(actor: str) -> bool:
    """Whether its one process has loaded it."""
    [pid] = actor_pids(actor)
    return "nixl" in Path(f"/proc/{pid}/maps").read_text()


def answers(http: httpx.Client, tokenizer: Tokenizer) -> dict[str, Any]:
    """To a pass key's chat, and to a text of any kind; greedy, with log-probabilities."""
    prompt = needle(tokenizer, TOKENS, 5)
    chat = {
        "model": MODEL, "messages": [{"role": "user", "content": prompt.content}],
        "max_tokens": 16, "temperature": 0, "logprobs": True,
    }  # fmt: skip
    [found] = posted(http, "/v1/chat/completions", chat)["choices"]
    assert NEEDLES[0].score(found["message"]["content"], prompt.expected) == 1
    body = ask_body(make_prompt(tokenizer, TOKENS), max_tokens=16, logprobs=1, ignore_eos=True)
    [other] = posted(http, "/v1/completions", body)["choices"]
    wait_until_no_page_is_held(http)
    return {
        "texts": [found["message"]["content"], other["text"]],
        "logprobs": [
            *(each["logprob"] for each in found["logprobs"]["content"]),
            *other["logprobs"]["token_logprobs"],
        ],
    }


def posted(http: httpx.Client, path: str, body: dict[str, Any]) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def recoveries(scraped: dict[tuple[str, ...], float]) -> float:
    """Requests that were begun again, for whatever reason."""
    return sum(n for key, n in scraped.items() if key[0] == "longreach_request_recoveries_total")


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


@pytest.fixture(scope="module")
def expected(tokenizer: Tokenizer) -> dict[str, Any]:
    """What a cluster answers whose pages go by Ray's object store."""
    with cluster_with("object_store") as running, http_of(running) as http:
        assert not has_nixl("DecodeWorker")
        return answers(http, tokenizer)


@pytest.fixture(scope="module")
def http(expected: dict[str, Any]) -> Iterator[httpx.Client]:
    """Of the cluster with NIXL; one cluster at a time."""
    with cluster_with("nixl") as running, http_of(running) as made:
        yield made


def test_pages_come_into_vllms_blocks_as_by_the_object_store(
    http: httpx.Client, tokenizer: Tokenizer, expected: dict[str, Any]
) -> None:
    assert has_nixl("DecodeWorker")
    assert has_nixl("PrefillRank")
    before = scrape(http)
    found = answers(http, tokenizer)
    after = scrape(http)
    # 71 pages of each prompt, of 5 layers, 2 heads, K and V, 128 tokens of 64 float32 values; once
    # more where a busy machine had a request begun again.
    prompt_bytes = 71 * 5 * 2 * 2 * 128 * 64 * 4
    handed = ("longreach_handoff_bytes_total", "decode")
    moved = after[handed] - before.get(handed, 0.0)
    again = recoveries(after) - recoveries(before)
    assert 2 * prompt_bytes <= moved <= (2 + again) * prompt_bytes
    assert found["texts"] == expected["texts"]
    assert found["logprobs"] == pytest.approx(expected["logprobs"], abs=1e-5)


def test_a_gang_that_dies_has_its_pages_back_out_of_vllms_blocks(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The next rank reads them there by NIXL, and goes on behind them."""
    body = ask_body(make_prompt(tokenizer, LONG), max_tokens=6, logprobs=1, ignore_eos=True)
    [calm] = posted(http, "/v1/completions", body)["choices"]
    total, back = ((f"longreach_prefill_tokens_{each}total", "prefill") for each in ("", "back_"))
    before = scrape(http)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(posted, http, "/v1/completions", body)
        enough = before[total] + 3 * CHUNK_TOKENS
        wait_for(lambda: scrape(http)[total] >= enough, 60, "three chunks")
        kill("PrefillRank")
        [found] = asking.result(240)["choices"]
    assert scrape(http)[back] - before.get(back, 0.0) >= 2 * CHUNK_TOKENS
    assert found["text"] == calm["text"]
    assert found["logprobs"]["token_logprobs"] == pytest.approx(
        calm["logprobs"]["token_logprobs"], abs=1e-5
    )
    wait_until_no_page_is_held(http, 30)
