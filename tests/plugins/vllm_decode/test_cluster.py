"""A real cluster whose decode engine is vLLM, on a CPU: `make test-vllm`."""

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest

from longreach.cluster.app import LocalCluster, start
from longreach.cluster.settings import parse_settings
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.evaluation.tasks import NEEDLES

from ...cluster.conftest import (
    actor_pids,
    ask_body,
    computed,
    make_prompt,
    scrape,
    wait_for,
    wait_until_no_page_is_held,
)

pytestmark = pytest.mark.live

MODEL = "longreach-pocket"
PORT, CHUNK_TOKENS = 8600, 2048
OWN = 1024
"""Prompts of up to so many tokens are computed by vLLM."""

SETTINGS: dict[str, Any] = {
    "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
    "limits": {"max_model_len": 65536, "max_output_tokens": 1024, "max_choices": 4},
    "prefill": {"chunk_tokens": CHUNK_TOKENS, "kv_cache_tokens": 131072, "cpus_per_rank": 0.5},
    "decode": {
        "engine": "vllm", "kv_cache_tokens": 98304, "cpus": 0.5, "prefill_up_to": OWN,
        "max_batch": 4,
    },
    "ingress": {"port": PORT, "progress_seconds": 0.2},
    "shutdown": {"drain_seconds": 120.0},
}  # fmt: skip


@pytest.fixture(scope="module")
def cluster() -> Iterator[LocalCluster]:
    running = start(parse_settings(SETTINGS))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(cluster: LocalCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=120) as made:
        yield made


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(CHECKPOINT)


def chat(client: openai.OpenAI, content: str, **options: Any) -> Any:
    asked: dict[str, Any] = {"max_tokens": 48, "temperature": 0, **options}
    messages: Any = [{"role": "user", "content": content}]
    return client.chat.completions.create(model=MODEL, messages=messages, **asked)


def needle(tokenizer: Tokenizer, tokens: int, seed: int) -> Any:
    def count(content: str) -> int:
        return len(tokenizer.encode_chat([{"role": "user", "content": content}]))

    return NEEDLES[0].prompt(tokens, seed, None, count)


@pytest.mark.parametrize("tokens", [600, 3000, 40_000])
def test_needles_are_found(
    client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer, tokens: int
) -> None:
    """Computed by vLLM, by a gang beyond a dual chunk, and by a gang sparsely."""
    prompt = needle(tokenizer, tokens, 5)
    answer = chat(client, prompt.content)
    assert NEEDLES[0].score(answer.choices[0].message.content, prompt.expected) == 1
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.prompt_tokens == tokens
    assert answer.usage.completion_tokens >= len(prompt.expected[0])
    wait_until_no_page_is_held(http)


def test_a_stream_is_its_answer_in_parts(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = needle(tokenizer, 3000, 6)
    whole = chat(client, prompt.content).choices[0].message.content
    events = list(chat(client, prompt.content, stream=True, stream_options={"include_usage": True}))
    parts = [event.choices[0].delta.content or "" for event in events if event.choices]
    assert "".join(parts) == whole
    assert sum(map(bool, parts)) > 1
    assert events[-1].usage.prompt_tokens == 3000


@pytest.mark.parametrize("tokens", [600, 3001])
def test_choices_share_a_prompt(
    client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer, tokens: int
) -> None:
    prompt = needle(tokenizer, tokens, 7)
    before = scrape(http).get(("longreach_prefill_tokens_total", "prefill"), 0.0)
    answer = chat(client, prompt.content, n=4)
    said = [choice.message.content for choice in answer.choices]
    assert said == [said[0]] * 4
    assert NEEDLES[0].score(said[0], prompt.expected) == 1
    after = scrape(http).get(("longreach_prefill_tokens_total", "prefill"), 0.0)
    assert after - before == (0 if tokens <= OWN else tokens)
    words: Any = make_prompt(tokenizer, tokens).tolist()
    drawn, again = (
        client.completions.create(
            model=MODEL, prompt=words, n=4, temperature=2, seed=1, max_tokens=16
        )
        for _ in range(2)
    )
    assert len({choice.text for choice in drawn.choices}) == 4
    assert [each.text for each in again.choices] == [each.text for each in drawn.choices]
    wait_until_no_page_is_held(http)


def test_log_probabilities_are_those_of_the_gangs_engine(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    """Of the first token, after a prompt beyond a dual chunk: vLLM computes the last one anew."""
    import torch

    from longreach.engine.local import LocalPrefill

    prompt = make_prompt(tokenizer, 5000)
    logits = LocalPrefill(CHECKPOINT, max_tokens=8192).logits(prompt, CHUNK_TOKENS)
    expected = torch.log_softmax(logits, 0)
    answer = client.completions.create(
        model=MODEL, prompt=prompt.tolist(), max_tokens=3, logprobs=5, temperature=0
    )
    found = answer.choices[0].logprobs
    assert found is not None
    assert found.top_logprobs is not None
    assert found.token_logprobs is not None
    best = torch.topk(expected, 5).values.tolist()
    assert sorted(found.top_logprobs[0].values(), reverse=True) == pytest.approx(best, abs=2e-3)
    assert found.token_logprobs[0] == pytest.approx(best[0], abs=2e-3)
    assert len(found.token_logprobs) == 3


def test_stop_strings_end_an_answer(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    prompt = needle(tokenizer, 3000, 8)
    [expected] = prompt.expected
    answer = chat(client, prompt.content, stop=[expected[2:4]])
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].message.content.strip() == expected[:2]


@pytest.mark.parametrize("tokens", [600, 3000])
def test_answers_are_held_to_a_schema(
    client: openai.OpenAI, tokenizer: Tokenizer, tokens: int
) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "grade": {"enum": ["A", "B"]}},
        "required": ["sure", "grade"],
        "additionalProperties": False,
    }
    form = {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}
    answer = chat(
        client, needle(tokenizer, tokens, 9).content, n=2, response_format=form, temperature=1,
        max_tokens=200,
    )  # fmt: skip
    for choice in answer.choices:
        said = json.loads(choice.message.content)
        assert type(said["sure"]) is bool
        assert said["grade"] in ("A", "B")
        assert choice.finish_reason == "stop"


def test_penalties_and_bias_are_vllms(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=8, temperature=0, logit_bias={"97": 100},
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert answer.choices[0].text == "a" * 8
    answer = client.completions.create(
        model=MODEL, prompt="abc", max_tokens=8, temperature=0,
        logit_bias={"97": 50, "98": 49}, frequency_penalty=2, extra_body={"ignore_eos": True},
    )  # fmt: skip
    assert sorted(answer.choices[0].text) == list("aaaabbbb")


def test_whoever_leaves_leaves_no_block_behind(http: httpx.Client, tokenizer: Tokenizer) -> None:
    """In mid-prompt, with blocks reserved, and in mid-answer."""
    prompt = make_prompt(tokenizer, 50_000)
    with (
        pytest.raises(httpx.ReadTimeout),
        httpx.Client(base_url=http.base_url, timeout=1.5) as hurried,
    ):
        hurried.post("/v1/completions", json=ask_body(prompt))
    wait_until_no_page_is_held(http, 30)
    short = make_prompt(tokenizer, 3000)
    body = ask_body(short, max_tokens=1000, stream=True, ignore_eos=True)
    with http.stream("POST", "/v1/completions", json=body) as response:
        for number, _ in enumerate(response.iter_lines()):
            if number > 20:
                break
    wait_until_no_page_is_held(http, 30)


def test_a_gang_that_dies_costs_no_answer(http: httpx.Client, tokenizer: Tokenizer) -> None:
    """Another rank goes on behind the pages that had come, which it reads out of vLLM's blocks."""
    prompt = make_prompt(tokenizer, 40_000)
    body = ask_body(prompt, max_tokens=6)
    calm = http.post("/v1/completions", json=body).json()
    back = ("longreach_prefill_tokens_back_total", "prefill")
    before = scrape(http).get(back, 0.0)

    def disturb() -> None:
        wait_for(lambda: computed(http) > 0, 30, "a prompt that is computed")
        time.sleep(2)
        import os
        import signal

        [pid] = actor_pids("PrefillRank")
        os.kill(pid, signal.SIGKILL)

    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(http.post, "/v1/completions", json=body, timeout=240)
        disturb()
        answer = asking.result(240)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["text"] == calm["choices"][0]["text"]
    assert scrape(http)[back] > before
    wait_until_no_page_is_held(http, 30)


def test_a_worker_that_dies_in_mid_answer_goes_on_with_the_same_text(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """Sampled, with a seed: what the client has is generated again in silence."""
    import os
    import signal

    prompt = make_prompt(tokenizer, 3000)
    body = ask_body(
        prompt, max_tokens=400, temperature=1.2, seed=3, ignore_eos=True, frequency_penalty=0.5
    )
    calm = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    text, killed = "", False
    with http.stream(
        "POST", "/v1/completions", json={**body, "stream": True}, timeout=240
    ) as response:
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line.removeprefix("data: "))
            assert "error" not in event
            text += "".join(choice["text"] for choice in event["choices"])
            if len(text) > 20 and not killed:
                killed = True
                [pid] = actor_pids("DecodeWorker")
                os.kill(pid, signal.SIGKILL)
    assert killed
    assert text == calm
    wait_until_no_page_is_held(http, 30)
