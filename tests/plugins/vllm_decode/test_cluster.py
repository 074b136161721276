"""A real cluster whose decode engine is vLLM, on a CPU: `make test-vllm`."""

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import httpx
import openai
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.app import LocalCluster
from longreach.cluster.metrics import NUM_REQUESTS_RUNNING
from longreach.cluster.metrics.exposition import FolderCollector
from longreach.engine.errors import UnavailableError
from longreach.engine.messages import Tokens
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
from .clusters import started
from .streams import events_of, kill, streamed, text_of

pytestmark = pytest.mark.live

MODEL = "longreach-pocket"
RETRIES = 2
PORT, CHUNK_TOKENS = 8540, 2048
OWN = 1024
"""Prompts of up to so many tokens are computed by vLLM."""

SETTINGS: dict[str, Any] = {
    "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
    "limits": {
        "max_model_len": 65536, "max_output_tokens": 1024, "max_choices": 4, "retries": RETRIES,
    },
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
    with started(SETTINGS) as running:
        yield running


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


@pytest.mark.parametrize("tokens", [600, CHUNK_TOKENS])
def test_prompts_are_scored_as_the_gangs_engine_scores_them(
    client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer, tokens: int
) -> None:
    """Of lengths that vLLM would compute itself as well, and beyond a dual chunk; dense.

    The answer behind them is vLLM's: what comes is what comes to the same prompt unscored.
    """
    import torch

    from longreach.engine.local import LocalPrefill

    prompt = make_prompt(tokenizer, tokens)
    asked: dict[str, Any] = {
        "model": MODEL, "prompt": prompt.tolist(), "logprobs": 1, "temperature": 0,
    }  # fmt: skip
    by_gang = ("longreach_prefill_tokens_total", "prefill")
    before = scrape(http).get(by_gang, 0.0)
    scored = client.completions.create(
        **asked, max_tokens=4, echo=True, extra_body={"prompt_logprobs": 0, "ignore_eos": True}
    )
    assert scrape(http)[by_gang] - before == tokens
    [choice] = scored.choices
    assert choice.logprobs is not None
    found: Any = choice.logprobs.token_logprobs
    assert len(found) == tokens + 4
    assert found[0] is None
    local = LocalPrefill(CHECKPOINT, max_tokens=8192)
    for end in (1, 2, tokens // 2, tokens - 1):
        row = torch.log_softmax(local.logits(prompt[:end]), 0)
        assert found[end] == pytest.approx(float(row[prompt[end]]), abs=1e-3)
    own_field: Any = (choice.model_extra or {})["prompt_logprobs"]
    each = [
        scores[str(token)]["logprob"]
        for token, scores in zip(prompt[1:].tolist(), own_field[1:], strict=True)
    ]
    assert each == pytest.approx(found[1:tokens], abs=1e-6)
    plain = client.completions.create(**asked, max_tokens=4, extra_body={"ignore_eos": True})
    assert choice.text.endswith(plain.choices[0].text)
    unscored: Any = plain.choices[0].logprobs
    assert found[tokens:] == pytest.approx(unscored.token_logprobs, abs=2e-3)
    wait_until_no_page_is_held(http)


def test_a_text_is_scored_without_an_answer(client: openai.OpenAI, http: httpx.Client) -> None:
    """As harnesses compare two ends: several prompts, and no answer behind them."""
    begin = "The golden vault holds the"
    ends = [" second singer.", "qzx%%vv#k~QQ@@}"]
    answer = client.completions.create(
        model=MODEL, prompt=[begin + end for end in ends], echo=True, logprobs=1, max_tokens=0,
    )  # fmt: skip
    sums = []
    for choice, end in zip(answer.choices, ends, strict=True):
        assert choice.text == begin + end
        found: Any = choice.logprobs
        assert len(found.token_logprobs) == len(begin + end)
        sums.append(sum(found.token_logprobs[len(begin) :]))
    assert sums[0] > sums[1]
    wait_until_no_page_is_held(http)


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


@dataclass(eq=False)
class Breaking:
    """Breaks hand-offs of one request: its worker refuses the gang's pages, as of one given up.

    Args:
        first_id: of the request's first attempt.
        most: attempts whose hand-off is broken.
    """

    first_id: str
    most: int
    broken: int = 0

    def run(self) -> None:
        names = (f"{self.first_id}-again-{n}" if n else self.first_id for n in range(self.most))
        for name in names:
            wait_for(lambda each=name: self._breaks(each), 60, f"{name} begins")
            self.broken += 1
            # As often as it takes: where pages go may only be said after this.
            wait_for(lambda each=name: not self._breaks(each), 60, f"{name} ends")

    def _breaks(self, name: str) -> bool:
        """Whether the request is there, whose pages are refused from now on."""
        time.sleep(0.1)
        named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
        [worker] = [
            ray.get_actor(each["name"], each["namespace"])
            for each in named
            if each["name"].startswith("longreach-decode-")
        ]
        try:
            ray.get(worker.go_on.remote(name))
        except UnavailableError:
            return False
        return True


def said_while_breaking(http: httpx.Client, prompt: Tokens, most: int) -> tuple[str, Any, int]:
    """An answer's text, or the error in place of its end; and how many attempts were broken."""
    text, error = "", None
    breaking: Breaking | None = None
    running: Future[None] | None = None
    body = ask_body(prompt, max_tokens=6, return_progress=True)
    with ThreadPoolExecutor(1) as pool, events_of(http, body) as events:
        for event in events:
            if "error" in event:
                error = event["error"]
                continue
            if breaking is None:
                breaking = Breaking(event["id"], most)
                running = pool.submit(breaking.run)
            text += text_of(event)
        assert breaking is not None
        assert running is not None
        running.result(60)
    return text, error, breaking.broken


def vllm_usage(http: httpx.Client) -> list[float]:
    """Share of its blocks that each vLLM says are in use."""
    return [v for key, v in scrape(http).items() if key[0] == "vllm:kv_cache_usage_perc"]


@pytest.mark.parametrize("most", [1, RETRIES + 1])
def test_hand_offs_that_break_are_begun_again_and_end_clearly(
    http: httpx.Client, tokenizer: Tokenizer, most: int
) -> None:
    """And one beside goes on, and vLLM holds no block."""
    prompt = make_prompt(tokenizer, 20_000)
    calm = http.post("/v1/completions", json=ask_body(prompt, max_tokens=6), timeout=240).json()
    failures = ("longreach_handoff_failures_total", "prefill")
    before = scrape(http)[failures]
    beside = ask_body(make_prompt(tokenizer, 600), max_tokens=800, ignore_eos=True)
    with ThreadPoolExecutor(1) as pool:
        asking = pool.submit(http.post, "/v1/completions", json=beside, timeout=240)
        text, error, broken = said_while_breaking(http, prompt, most)
        assert asking.result(240).json()["usage"]["completion_tokens"] == 800
    assert broken == most
    assert scrape(http)[failures] >= before + most
    if most <= RETRIES:
        assert error is None
        assert text == calm["choices"][0]["text"]
    else:
        assert text == ""
        assert error["code"] == "poisonous"
    wait_until_no_page_is_held(http, 30)
    assert vllm_usage(http) == [0.0]


def test_vllms_own_metrics_stand_beside_ours(http: httpx.Client, tokenizer: Tokenizer) -> None:
    def counted() -> dict[tuple[str, ...], float]:
        return {(name, *rest): value for (name, *rest), value in scrape(http).items()}

    names = {"vllm:generation_tokens_total": 8.0, "vllm:prompt_tokens_total": 700.0}
    before = counted()
    body = ask_body(make_prompt(tokenizer, 700), max_tokens=8, ignore_eos=True)
    assert http.post("/v1/completions", json=body).status_code == 200
    wait_until_no_page_is_held(http)
    after = counted()
    for name, grown in names.items():
        key = (name, "0", "decode")
        assert after[key] == before.get(key, 0.0) + grown
    ours = ("longreach_generation_tokens_total", "ingress")
    assert after[ours] == before.get(ours, 0.0) + 8
    families = {family.name for family in text_string_to_metric_families(http.get("/metrics").text)}
    assert len({name for name in families if name.startswith("vllm:")}) > 30


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
        kill("PrefillRank")

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
    prompt = make_prompt(tokenizer, 3000)
    body = ask_body(
        prompt, max_tokens=400, temperature=1.2, seed=3, ignore_eos=True, frequency_penalty=0.5
    )
    calm = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert streamed(http, body, partial(kill, "DecodeWorker")) == calm
    wait_until_no_page_is_held(http, 30)


def running_answers(cluster: LocalCluster) -> float:
    """Requests in mid-answer, by what processes leave in files: while it stops nothing scrapes."""
    families = FolderCollector(cluster.metrics_directory).collect()
    return sum(
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == NUM_REQUESTS_RUNNING.name and sample.labels["role"] == "decode"
    )


def test_stopping_lets_accepted_requests_finish_and_refuses_new_ones(
    cluster: LocalCluster, http: httpx.Client, tokenizer: Tokenizer
) -> None:
    """The last test of the cluster that all others share, which ends it.

    Of the requests that it has accepted one is in mid-answer, and one in mid-prompt.
    """
    going = ask_body(make_prompt(tokenizer, 600), max_tokens=1000, ignore_eos=True)
    coming = ask_body(make_prompt(tokenizer, 40_000), max_tokens=6, ignore_eos=True)
    calm = [http.post("/v1/completions", json=body, timeout=240).json() for body in (going, coming)]
    stopping = threading.Thread(target=cluster.stop)
    told: list[httpx.Response] = []

    def stop() -> None:
        prompt = pool.submit(http.post, "/v1/completions", json=coming, timeout=240)
        asked.append(prompt)
        wait_for(lambda: computed(http) > 0, 60, "a prompt that is computed")
        stopping.start()
        wait_for(lambda: http.get("/v1/models").status_code != 200, 30, "the end being announced")
        told.extend(http.post("/v1/completions", json=body) for body in (going, coming))
        assert not prompt.done(), "it was in mid-prompt"
        assert running_answers(cluster) == 1, "the stream was in its middle"

    asked: list[Future[httpx.Response]] = []
    with ThreadPoolExecutor(1) as pool:
        text = streamed(http, going, stop)
        [answer] = [each.result(240) for each in asked]
    stopping.join(120)
    assert text == calm[0]["choices"][0]["text"]
    assert answer.status_code == 200, answer.text
    assert answer.json()["choices"][0]["text"] == calm[1]["choices"][0]["text"]
    for refused in told:
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
    assert not stopping.is_alive()
    wait_for(lambda: not actor_pids(""), 10, "no process of Ray's left")
