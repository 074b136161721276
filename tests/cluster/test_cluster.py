"""The whole cluster from outside: real Ray, real HTTP, the official client."""

import asyncio
import json
import os
import signal
import socket
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import psutil
import pytest
from openai.types.chat import ChatCompletionUserMessageParam

from longreach.cluster.app import LocalCluster, deploy
from longreach.cluster.cli.demo import is_right
from longreach.cluster.cli.needle import hide_key
from longreach.cluster.client import Endpoint
from longreach.engine.messages import Tokens
from longreach.engine.text.tokenizer import Tokenizer

from ..prometheus import prometheus_server, wait_for_value
from .conftest import (
    CHUNK_TOKENS,
    LONG,
    MODEL,
    MOST_WAITING,
    actor_pids,
    ask_body,
    computed,
    gangs_with,
    has_torch,
    make_prompt,
    make_settings,
    scrape,
    wait_for,
    wait_until_no_page_is_held,
)


def test_who_answers_clients_does_not_stand_behind_them(cluster: LocalCluster) -> None:
    """As Ray has its actors do by default: with few cores, a busy client would be served late."""
    for actor in ("ProxyActor", "ServeReplica:longreach:ingress", "DecodeWorker"):
        assert {psutil.Process(pid).nice() for pid in actor_pids(actor)} == {os.nice(0)}


def test_a_key_hidden_in_a_long_document_is_found(cluster: LocalCluster) -> None:
    endpoint = Endpoint(cluster.url)
    hidden = hide_key(20_000, lambda messages: endpoint.count_tokens(MODEL, messages), 7, 0.3)
    progress = []
    answer = endpoint.ask(MODEL, hidden.messages, 16, progress.append)
    assert is_right(answer.text, hidden.expected)
    assert answer.finish_reason == "stop"
    assert answer.prompt_tokens == 20_000
    done = [report.done for report in progress]
    assert done == sorted(done)
    assert len(set(done)) > 3


def test_answers_are_held_to_a_schema(client: openai.OpenAI, http: httpx.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"sure": {"type": "boolean"}, "grade": {"enum": ["A", "B"]}},
        "required": ["sure", "grade"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Well?"}], n=3, seed=1,
        response_format={"type": "json_schema",
                         "json_schema": {"name": "it", "strict": True, "schema": schema}},
    )  # fmt: skip
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        said = json.loads(choice.message.content or "")
        assert type(said["sure"]) is bool
        assert said["grade"] in ("A", "B")
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(model=MODEL, prompt="a", extra_body={"guided_regex": "(a"})
    assert refused.value.param == "guided_regex"
    wait_until_no_page_is_held(http)


def test_prompts_are_scored_by_all_ranks(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """Over chunks and ranks as in one process; and more prompts than may wait."""
    import torch

    from longreach.engine.local import LocalPrefill
    from longreach.engine.model.pocket import CHECKPOINT

    # As long as prefill is dense: what it selects otherwise goes by chunks.
    prompts = [make_prompt(tokenizer, CHUNK_TOKENS + 900), *[make_prompt(tokenizer, 9)] * 11]
    answer = client.completions.create(
        model=MODEL, prompt=[prompt.tolist() for prompt in prompts], max_tokens=0, logprobs=0,
        echo=True,
    )  # fmt: skip
    assert len(answer.choices) == len(prompts)
    found = [choice.logprobs.token_logprobs for choice in answer.choices if choice.logprobs]
    assert all(scores is not None for scores in found)
    long, short = found[0] or [], found[-1] or []
    local = LocalPrefill(CHECKPOINT, max_tokens=8192)
    for scores, prompt in ((long, prompts[0]), (short, prompts[-1])):
        assert len(scores) == len(prompt)
        for end in (1, len(prompt) // 2, len(prompt) - 1):
            row = torch.log_softmax(local.logits(prompt[:end]), 0)
            assert scores[end] == pytest.approx(float(row[prompt[end]]), abs=1e-3)


def test_a_tool_is_called(client: openai.OpenAI) -> None:
    parameters = {
        "type": "object",
        "properties": {"loud": {"type": "boolean"}},
        "required": ["loud"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model=MODEL, messages=[{"role": "user", "content": "Ring!"}], temperature=0,
        tools=[{"type": "function", "function": {"name": "ring", "parameters": parameters}}],
        tool_choice="required", parallel_tool_calls=False,
    )  # fmt: skip
    [call] = answer.choices[0].message.tool_calls or []
    assert call.type == "function"
    assert call.function.name == "ring"
    assert json.loads(call.function.arguments)["loud"] in (True, False)
    assert answer.choices[0].finish_reason == "tool_calls"


def test_answers_equal_those_of_one_process(
    client: openai.OpenAI, tokenizer: Tokenizer, cluster: LocalCluster
) -> None:
    """Two ranks, two chunks and a hand-off, against one process and one chunk; dense."""
    import torch

    from longreach.engine.local import LocalPrefill
    from longreach.engine.model.pocket import CHECKPOINT

    prompt = make_prompt(tokenizer, CHUNK_TOKENS + 900)
    answer = client.completions.create(
        model=MODEL, prompt=prompt.tolist(), max_tokens=6, temperature=0, logprobs=1,
        extra_body={"ignore_eos": True},
    )  # fmt: skip
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    local = LocalPrefill(CHECKPOINT, max_tokens=8192)
    text = prompt
    for said in logprobs.token_logprobs:
        expected = torch.log_softmax(local.logits(text), 0)
        assert said == pytest.approx(float(expected.max()), abs=1e-3)
        text = np.append(text, np.int32(expected.argmax()))


def test_the_official_client_streams_and_counts(client: openai.OpenAI) -> None:
    said: ChatCompletionUserMessageParam = {"role": "user", "content": "Say something."}
    whole = client.chat.completions.create(model=MODEL, messages=[said], max_tokens=12, seed=3, n=2)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[said],
        max_tokens=12,
        seed=3,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
    )
    texts = {0: "", 1: ""}
    usage = None
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert [choice.message.content for choice in whole.choices] == [texts[0], texts[1]]
    assert usage is not None
    assert usage == whole.usage
    assert usage.completion_tokens <= 24


def test_many_at_once_answer_as_each_alone(cluster: LocalCluster, tokenizer: Tokenizer) -> None:
    bodies = [
        {"prompt": make_prompt(tokenizer, 200 + 331 * i).tolist(), "seed": i} for i in range(6)
    ]

    async def ask(client: openai.AsyncOpenAI, body: dict) -> str:
        answer = await client.completions.create(model=MODEL, max_tokens=10, **body)
        return answer.choices[0].text

    async def run() -> tuple[list[str], list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none") as client:
            alone = [await ask(client, body) for body in bodies]
            together = []
            for pair in range(0, len(bodies), MOST_WAITING):
                asked = [ask(client, body) for body in bodies[pair : pair + MOST_WAITING]]
                together += await asyncio.gather(*asked)
        return alone, together

    alone, together = asyncio.run(run())
    assert together == alone


def test_a_short_prompt_does_not_wait_for_a_long_one(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    ended: dict[str, float] = {}

    def ask(name: str, tokens: int) -> None:
        answer = http.post("/v1/completions", json=ask_body(make_prompt(tokenizer, tokens)))
        assert answer.status_code == 200, answer.text
        ended[name] = time.monotonic()

    with ThreadPoolExecutor(2) as pool:
        long = pool.submit(ask, "long", 8000)
        wait_for(lambda: computed(http) > 0, 30, "the long prompt's first chunk")
        pool.submit(ask, "short", 100).result()
        assert not long.done()
        long.result()
    assert ended["short"] < ended["long"]


def test_a_client_that_leaves_before_its_request_is_whole_costs_nothing(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    host, port = cluster.url.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Length: 1000\r\n\r\n"
    with socket.create_connection((host, int(port))) as leaving:
        leaving.sendall(head.encode() + b'{"model": "longreach-pocket", ')
    # Ray's proxy waits for the whole body, so nothing behind it has heard of this request.
    wait_until_no_page_is_held(http)
    answer = http.post("/v1/completions", json=ask_body(make_prompt(tokenizer, 20)))
    assert answer.status_code == 200


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_during_prefill_stops_it(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer, stream: bool
) -> None:
    wait_until_no_page_is_held(http)
    before = scrape(http)
    body = ask_body(make_prompt(tokenizer, LONG), stream=stream)
    with httpx.Client(base_url=cluster.url, timeout=httpx.Timeout(60, read=3.0)) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as answer:
                lines = answer.iter_lines()
                while not next(lines).startswith(": prefill"):
                    pass
        else:
            with pytest.raises(httpx.ReadTimeout):
                leaving.post("/v1/completions", json=body)
    wait_until_no_page_is_held(http)
    after = scrape(http)
    cancelled = ("longreach_requests_total", "cancelled", "ingress")
    wait_for(lambda: scrape(http).get(cancelled, 0) == before.get(cancelled, 0) + 1, 5, "outcome")
    tokens = ("longreach_prefill_tokens_total", "prefill")
    assert after[tokens] - before.get(tokens, 0) < LONG


def test_a_client_that_leaves_during_decode_stops_it(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    body = ask_body(make_prompt(tokenizer, 300), max_tokens=4000, ignore_eos=True, stream=True)
    with (
        httpx.Client(base_url=cluster.url, timeout=60) as leaving,
        leaving.stream("POST", "/v1/completions", json=body) as answer,
    ):
        lines = answer.iter_lines()
        while not next(lines).startswith("data: "):
            pass
    wait_until_no_page_is_held(http)


def test_a_full_queue_says_when_to_come_back(http: httpx.Client, tokenizer: Tokenizer) -> None:
    long, short = make_prompt(tokenizer, 8000), make_prompt(tokenizer, 2000)
    with ThreadPoolExecutor(8) as pool:
        first = pool.submit(http.post, "/v1/completions", json=ask_body(long))
        wait_for(lambda: computed(http) > 0, 30, "the first prompt's first chunk")
        others = [
            pool.submit(http.post, "/v1/completions", json=ask_body(short))
            for _ in range(MOST_WAITING + 3)
        ]
        answers = [other.result() for other in others]
        assert first.result().status_code == 200
    refused = [answer for answer in answers if answer.status_code == 429]
    assert refused
    assert all(answer.status_code in (200, 429) for answer in answers)
    for answer in refused:
        assert int(answer.headers["retry-after"]) > 0
        assert answer.json()["error"]["code"] == "queue_full"
    wait_until_no_page_is_held(http)


@pytest.mark.parametrize(
    ("path", "content", "status", "code"),
    [
        ("completions", b'{"model"', 400, None),
        ("completions", b'{"model": "longreach-pocket", "prompt": "\xff"}', 400, None),
        ("completions", {"prompt": ""}, 400, "empty_prompt"),
        ("completions", {"prompt": "a", "n": 99}, 400, "invalid_value"),
        ("completions", {"prompt": "a", "logprobs": 99}, 400, "invalid_value"),
        ("completions", {"prompt": "a", "max_tokens": "4"}, 400, "invalid_value"),
        ("completions", {"prompt": [5, 999_999]}, 400, "token_id_out_of_range"),
        ("completions", {"prompt": [65] * 131_073}, 400, "context_length_exceeded"),
        ("completions", {"prompt": "a", "model": "gpt"}, 404, "model_not_found"),
        ("chat/completions", {"messages": [], "x": 1}, 400, None),
        ("chat/completions", {"messages": [{"role": "user", "content": 1}]}, 400, None),
    ],
)
def test_bad_input_is_refused_and_holds_nothing(
    http: httpx.Client, path: str, content: bytes | dict, status: int, code: str | None
) -> None:
    if isinstance(content, dict):
        content = json.dumps({"model": MODEL, **content}).encode()
    headers = {"Content-Type": "application/json"}
    answer = http.post(f"/v1/{path}", content=content, headers=headers)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert code is None or error["code"] == code
    assert "Traceback" not in answer.text
    wait_until_no_page_is_held(http)


def test_figures_equal_what_was_sent(http: httpx.Client, tokenizer: Tokenizer) -> None:
    before = scrape(http)
    answer = http.post("/v1/completions", json=ask_body(make_prompt(tokenizer, 5000)))
    used = answer.json()["usage"]
    after = scrape(http)

    def grown(*key: str) -> float:
        return after.get(key, 0.0) - before.get(key, 0.0)

    assert grown("longreach_requests_total", "success", "ingress") == 1
    assert grown("longreach_prompt_tokens_total", "ingress") == 5000
    assert grown("longreach_prefill_tokens_total", "prefill") == 5000
    assert grown("longreach_generation_tokens_total", "ingress") == used["completion_tokens"]
    assert grown("longreach_prefill_chunks_total", "prefill") == -(-5000 // CHUNK_TOKENS)
    pages = -(-5000 // 128)
    bytes_a_page = 5 * 2 * 2 * 128 * 64 * 4  # layers, KV heads, K and V, tokens, dimension, float32
    assert grown("longreach_handoff_bytes_total", "decode") == pages * bytes_a_page
    for name in ("time_to_first_token", "request_queue_time", "request_prefill_time"):
        assert grown(f"longreach_{name}_seconds_count", "8k", "ingress") == 1
    timings = answer.json()["longreach"]["timings"][0]
    assert timings["prefill"] == pytest.approx(
        grown("longreach_request_prefill_time_seconds_sum", "8k", "ingress"), abs=1e-6
    )


def test_a_real_prometheus_sees_what_was_sent(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    with prometheus_server(tmp_path, {"longreach": [cluster.url.removeprefix("http://")]}) as url:
        chunks = 'longreach_prefill_chunks_total{role="prefill"}'
        before = scrape(http)["longreach_prefill_chunks_total", "prefill"]
        wait_for_value(url, chunks, before)
        http.post("/v1/completions", json=ask_body(make_prompt(tokenizer, 3 * CHUNK_TOKENS)))
        wait_for_value(url, chunks, before + 3)
        wait_for_value(url, 'longreach_kv_cache_usage_perc{role="decode"}', 0)
        wait_for_value(url, "count(longreach_num_requests_running)", 3)


def tokens_computed(http: httpx.Client) -> float:
    return scrape(http).get(("longreach_prefill_tokens_total", "prefill"), 0.0)


SURVIVES = 8 * CHUNK_TOKENS
"""Tokens of a prompt whose processes die."""


@pytest.fixture(scope="module")
def undisturbed(cluster: LocalCluster, tokenizer: Tokenizer) -> tuple[dict[str, Any], Any]:
    """What is asked of processes that die, and what is answered where none does."""
    body = ask_body(make_prompt(tokenizer, SURVIVES), temperature=0.8, seed=5)
    answer = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=120)
    assert answer.status_code == 200, answer.text
    return body, answer.json()["choices"]


@pytest.mark.parametrize(
    "actor",
    [
        "PrefillRank",
        "DecodeWorker",
        pytest.param("ServeReplica:longreach:decode", marks=pytest.mark.slow),
    ],
)
def test_a_dead_process_costs_its_requests_a_pause_and_is_replaced(
    http: httpx.Client, undisturbed: tuple[dict[str, Any], Any], actor: str
) -> None:
    """A rank is replaced alone, a decode worker takes its replica with it, and that its worker.

    What was computed is not lost with any: pages lie at the other rank, or at the gang.
    """
    body, expected = undisturbed
    before, tokens_before = actor_pids(actor), tokens_computed(http)
    assert len(before) == (2 if actor == "PrefillRank" else 1)

    def is_replaced() -> bool:
        now = set(actor_pids(actor))
        return len(now) == len(before) and now & set(before) == set(before[1:])

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.post, "/v1/completions", json=body)
        wait_for(
            lambda: tokens_computed(http) - tokens_before >= 4 * CHUNK_TOKENS, 60, "four chunks"
        )
        os.kill(before[0], signal.SIGKILL)
        # `/ready` waits for a replica for a while itself, and may find the next one; and a gang
        # that goes on was ready all the time.
        wait_for(
            lambda: http.get("/ready").status_code == 503 or is_replaced(),
            30,
            "that it is not ready, or not any more",
        )
        answer = asked.result()
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"] == expected
    # The chunk under way at the death has counted for nothing, and one before it may have to come
    # again.
    assert tokens_computed(http) - tokens_before <= SURVIVES + CHUNK_TOKENS
    wait_for(lambda: http.get("/ready").status_code == 200, 30, "that it is ready")
    wait_for(is_replaced, 30, "that it is replaced")
    # And what took its place serves.
    assert http.post("/v1/completions", json=body).json()["choices"] == expected
    wait_until_no_page_is_held(http)
    # Loading it would stop a replica for seconds, with a prompt under way.
    assert [has_torch(pid) for pid in actor_pids("ServeReplica:longreach:")] == [False] * 3
    assert all(has_torch(pid) for pid in actor_pids("PrefillRank"))


def ranks_together(http: httpx.Client) -> float:
    return scrape(http).get(("longreach_prefill_ranks", "prefill"), 0.0)


@pytest.mark.slow
def test_a_prompt_outlives_every_rank_that_it_began_with(
    http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The other one goes on, a new one gets the prompt's pages from it, and goes on alone."""
    before, tokens_before = actor_pids("PrefillRank"), tokens_computed(http)
    wait_for(lambda: ranks_together(http) == 2, 30, "both ranks")
    tokens = 125_000
    body = ask_body(make_prompt(tokenizer, tokens), temperature=0.8, seed=5)

    def done() -> float:
        return tokens_computed(http) - tokens_before

    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(http.post, "/v1/completions", json=body, timeout=300)
        wait_for(lambda: done() >= 4 * CHUNK_TOKENS, 60, "four chunks")
        os.kill(before[0], signal.SIGKILL)
        wait_for(lambda: ranks_together(http) == 1, 30, "one rank alone")
        wait_for(lambda: ranks_together(http) == 2, 60, "a new one")
        joined = done()
        assert joined < tokens
        wait_for(lambda: done() >= joined + 2 * CHUNK_TOKENS, 60, "two chunks with it")
        os.kill(before[1], signal.SIGSTOP)
        answer = asked.result()
    assert answer.status_code == 200, answer.text
    assert done() <= tokens + 2 * CHUNK_TOKENS
    wait_for(lambda: ranks_together(http) == 2, 60, "two ranks again")
    undisturbed = http.post("/v1/completions", json=body, timeout=300)
    assert answer.json()["choices"] == undisturbed.json()["choices"]
    wait_until_no_page_is_held(http)


def test_a_redeploy_serves_new_settings_and_loses_no_request(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """Two cores have no room for two gangs, so that the new one waits for the old one's end.

    One request is under way at the old replicas, and one comes while they are being replaced.
    """
    settings = make_settings(int(cluster.url.rpartition(":")[2]))
    limits = settings.limits.model_copy(update={"max_logprobs": 3})
    prefill = gangs_with(settings, chunk_tokens=2 * CHUNK_TOKENS)
    changed = settings.model_copy(update={"limits": limits, "prefill": prefill})
    short, medium = make_prompt(tokenizer, 2 * CHUNK_TOKENS), make_prompt(tokenizer, 14_000)

    def ask(prompt: Tokens, **fields: int) -> httpx.Response:
        return http.post("/v1/completions", json=ask_body(prompt, **fields))

    def chunks() -> float:
        return scrape(http)["longreach_prefill_chunks_total", "prefill"]

    expected = [ask(prompt).json()["choices"] for prompt in (medium, short)]
    assert ask(short[:50], logprobs=4).status_code == 200
    with ThreadPoolExecutor(3) as pool:
        under_way = pool.submit(ask, medium)
        wait_for(lambda: computed(http) > 0, 30, "the first chunk")
        redeploy = pool.submit(deploy, changed, cluster.metrics_directory)
        wait_for(lambda: ask(short[:50], logprobs=4).status_code == 400, 60, "new settings")
        arriving = pool.submit(ask, short)
        answers = [under_way.result(), arriving.result()]
        redeploy.result()
    for answer, choices in zip(answers, expected, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"] == choices
    before = chunks()
    assert ask(short).status_code == 200
    assert chunks() - before == 1, "chunks are twice as long now"
    wait_until_no_page_is_held(http)
