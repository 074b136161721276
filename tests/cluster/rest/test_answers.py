"""What the endpoint answers when all is well, checked with OpenAI's own types."""

import json
import time

import httpx
import pytest
from openai.types import Completion
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.rest import build_refusal

from .backend import MODEL, Endpoint


def events(answer: httpx.Response) -> list[dict]:
    """The data of a stream's events; it must end as OpenAI's do."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    data = [line[6:] for line in answer.text.splitlines() if line.startswith("data: ")]
    assert data[-1] == "[DONE]"
    return [json.loads(one) for one in data[:-1]]


def test_a_chat_is_answered_in_openais_shape(endpoint: Endpoint) -> None:
    answer = ChatCompletion.model_validate(endpoint.chat().json())
    assert answer.choices[0].message.content == "Yes."
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 4
    assert answer.usage.prompt_tokens == len(endpoint.backend.requests[0].prompt)
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_a_streamed_chat_says_the_same(endpoint: Endpoint) -> None:
    chunks = [
        ChatCompletionChunk.model_validate(event)
        for event in events(endpoint.chat(stream=True, n=2, stream_options={"include_usage": True}))
    ]
    text = {0: "", 1: ""}
    for chunk in chunks:
        for choice in chunk.choices:
            text[choice.index] += choice.delta.content or ""
    assert text == {0: "Yes.", 1: "Yes."}
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_usage_is_streamed_only_when_asked_for(endpoint: Endpoint) -> None:
    assert all("usage" not in event for event in events(endpoint.chat(stream=True)))


def test_a_long_prefill_is_reported_in_comments(endpoint: Endpoint) -> None:
    endpoint.backend.prefill_seconds = 0.2
    answer = endpoint.chat(stream=True)
    comments = [line for line in answer.text.splitlines() if line.startswith(": prefill")]
    tokens = len(endpoint.backend.requests[0].prompt)
    assert len(comments) >= 3
    assert comments[-1] == f": prefill {100 * (tokens // 2) // tokens}% {tokens // 2}/{tokens}"
    assert events(answer)


def test_completions_take_text_and_ids_and_several(endpoint: Endpoint) -> None:
    answer = endpoint.complete(prompt=[[65, 66], [67]], n=2)
    choices = Completion.model_validate(answer.json()).choices
    assert [choice.index for choice in choices] == [0, 1, 2, 3]
    assert [request.prompt.tolist() for request in endpoint.backend.requests] == [[65, 66], [67]]
    assert events(endpoint.complete(prompt="AB", stream=True))[0]["choices"][0]["text"] == "Y"
    assert endpoint.backend.requests[-1].prompt.tolist() == [65, 66]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities(endpoint: Endpoint, stream: bool) -> None:
    answer = endpoint.chat(logprobs=True, top_logprobs=2, stream=stream)
    parts = events(answer) if stream else [answer.json()]
    content = [
        token
        for part in parts
        for choice in part["choices"]
        for token in (choice["logprobs"] or {"content": []})["content"]
    ]
    assert [token["token"] for token in content] == list("Yes.")
    assert [len(token["top_logprobs"]) for token in content] == [2] * 4
    answer = endpoint.complete(logprobs=1, stream=stream)
    part = events(answer)[0] if stream else answer.json()
    logprobs = part["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == "Y"
    assert logprobs["text_offset"][0] == 0


def test_sampling_parameters_reach_the_engine(endpoint: Endpoint) -> None:
    endpoint.chat(
        temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, seed=-3, stop="end", max_tokens=9,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5, ignore_eos=True,
        logit_bias={"65": 3}, stop_token_ids=[66],
    )  # fmt: skip
    sampling = endpoint.backend.requests[0].sampling
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (0.5, 0.9, 7)
    assert (sampling.min_p, sampling.seed, sampling.stop) == (0.1, -3, ("end",))
    assert (sampling.presence_penalty, sampling.frequency_penalty) == (1, -1)
    assert (sampling.repetition_penalty, sampling.ignore_eos) == (1.5, True)
    assert (sampling.logit_bias, sampling.stop_token_ids) == (((65, 3.0),), (66,))
    assert sampling.max_tokens == 9


def test_without_max_tokens_as_many_as_fit(endpoint: Endpoint) -> None:
    endpoint.complete(prompt=[65] * 80)
    endpoint.complete(prompt=[65] * 10)
    assert [r.sampling.max_tokens for r in endpoint.backend.requests] == [20, 50]


def test_special_tokens_in_user_text_stay_text(endpoint: Endpoint) -> None:
    endpoint.chat(messages=[{"role": "user", "content": "<|im_end|>"}])
    endpoint.complete(prompt="<|im_end|>")
    chat, completion = (request.prompt.tolist() for request in endpoint.backend.requests)
    assert completion == list(b"<|im_end|>")
    control = [token for token in chat if token >= 256]
    # Of the template alone: the user's turn begins and ends, the assistant's begins.
    assert control == [257, 258, 257]


def test_models_tokens_and_state(endpoint: Endpoint) -> None:
    [model] = endpoint.request("GET", "/v1/models").json()["data"]
    assert (model["id"], model["max_model_len"]) == (MODEL, 100)
    assert endpoint.request("GET", f"/v1/models/{MODEL}").json()["id"] == MODEL
    tokens = endpoint.post("/tokenize", {"prompt": "né"}).json()
    assert tokens["tokens"] == list("né".encode())
    assert tokens["count"] == 3
    back = endpoint.post("/detokenize", {"tokens": tokens["tokens"]}).json()
    assert back["prompt"] == "né"
    for method in ("GET", "HEAD"):
        assert endpoint.request(method, "/health").status_code == 200
        assert endpoint.request(method, "/ready").status_code == 200
    endpoint.backend.is_ready = False
    assert endpoint.request("GET", "/ready").status_code == 503
    assert endpoint.request("GET", "/version").json()["version"]
    endpoint.chat()
    assert "longreach_requests_total" in endpoint.request("GET", "/metrics").text


@pytest.mark.parametrize(("at_once", "steps"), [(1, 8), (4, 2)])
def test_tokens_that_come_together_are_not_taken_for_fast_ones(
    endpoint: Endpoint, at_once: int, steps: int
) -> None:
    """The first ones say nothing about the time between two."""
    backend = endpoint.backend
    backend.at_once, backend.step_seconds = at_once, 0.04
    backend.text = "x" * (at_once * (steps + 1))
    started = time.monotonic()
    endpoint.complete()
    seconds = time.monotonic() - started
    values = samples(endpoint)
    name = "longreach_inter_token_latency_seconds"
    assert values[f"{name}_count"] == at_once * steps
    assert 0.04 * steps <= values[f"{name}_sum"] < seconds
    assert values[f"{name}_bucket", "0.006"] == 0
    chunks = "longreach_inter_chunk_latency_seconds"
    assert values[f"{chunks}_count"] == steps
    assert values[f"{chunks}_bucket", "0.03"] == 0


def samples(endpoint: Endpoint) -> dict[str | tuple[str, str], float]:
    """Name, or name and bucket -> value."""
    text = endpoint.request("GET", "/metrics").text
    return {
        (sample.name, sample.labels["le"]) if "le" in sample.labels else sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_one_id_names_a_request_everywhere(
    endpoint: Endpoint, caplog: pytest.LogCaptureFixture
) -> None:
    headers = {"x-request-id": "trace-7"}
    body = {"model": MODEL, "prompt": ["a", "b"]}
    for _ in range(2):
        answer = endpoint.post("/v1/completions", body, headers=headers)
        assert answer.headers.get_list("x-request-id") == ["trace-7"]
        assert "trace-7" in answer.json()["id"]
    engine_ids = [request.request_id for request in endpoint.backend.requests]
    assert len(set(engine_ids)) == 4
    assert all("trace-7" in one for one in engine_ids)
    endpoint.backend.error = RuntimeError("secret")
    failed = endpoint.post("/v1/completions", body, headers=headers)
    assert "trace-7" in failed.json()["error"]["message"]
    assert "trace-7" in caplog.text


def test_every_answer_carries_a_request_id(endpoint: Endpoint) -> None:
    own = endpoint.request("GET", "/health", headers={"x-request-id": "mine-1"})
    assert own.headers["x-request-id"] == "mine-1"
    odd = endpoint.request("GET", "/health", headers={"x-request-id": "a b"})
    assert odd.headers["x-request-id"] not in ("a b", "")


@pytest.mark.parametrize(
    ("method", "path"), [("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/")]
)
def test_a_cluster_that_stops_refuses_everything_and_says_when_to_come_back(
    endpoint: Endpoint, method: str, path: str
) -> None:
    endpoint.api = build_refusal()
    refused = endpoint.request(method, path, headers={"x-request-id": "mine-1"})
    assert refused.status_code == 503
    assert refused.json()["error"]["type"] == "server_error"
    assert refused.json()["error"]["code"] == "shutting_down"
    assert int(refused.headers["retry-after"]) > 0
    assert refused.headers["x-request-id"] == "mine-1"
