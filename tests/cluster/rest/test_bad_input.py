"""What is refused, with which status and words, and that nothing else happens."""

import json
from pathlib import Path
from typing import Any

import httpx
import pytest

from longreach.cluster.rest import read_api_keys
from longreach.engine.errors import (
    ConfigurationError,
    OutOfPagesError,
    PromptTooLongError,
    QueueFullError,
    UnavailableError,
)

from .backend import LIMITS, MODEL, Endpoint

USER = {"role": "user", "content": "Well?"}


def refused(answer: httpx.Response, status: int) -> dict[str, Any]:
    """The error, in OpenAI's shape, with nothing of ours shining through."""
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert "Traceback" not in answer.text
    assert "pydantic" not in answer.text
    return error


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b'{"model": }', b"\xff\xfe", b'{"model": "\xff"}', b"[]", b"null", b"NaN"],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/tokenize"])
def test_bodies_that_are_no_json_objects(endpoint: Endpoint, path: str, content: bytes) -> None:
    refused(endpoint.request("POST", path, content=content), 400)
    assert not endpoint.backend.requests


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 51}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop.0"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"259": 1}}, "logit_bias"),
        ({"logit_bias": {"65": 200}}, "logit_bias.65"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"presence_penalty": 9}, "presence_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": 1e-320}, "repetition_penalty"),
        ({"stream": "yes"}, "stream"),
        ({"colour": "red"}, "colour"),
    ],
)
@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_fields_out_of_range_or_unknown(
    endpoint: Endpoint, kind: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(getattr(endpoint, kind)(**fields), 400)
    assert error["param"] == param
    assert not endpoint.backend.requests


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "at most 5"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"stream_options": {"include_usage": True}}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ({"messages": [{**USER, "name": "me"}]}, "name"),
    ],
)
def test_chats_that_cannot_be_served(endpoint: Endpoint, fields: dict[str, Any], said: str) -> None:
    assert said in refused(endpoint.chat(**fields), 400)["message"]
    assert not endpoint.backend.requests


@pytest.mark.parametrize(
    ("fields", "code"),
    [
        ({"prompt": ""}, "empty_prompt"),
        ({"prompt": []}, "invalid_value"),
        ({"prompt": [1, "a"]}, "invalid_value"),
        ({"prompt": [True]}, "invalid_value"),
        ({"prompt": [-1]}, "token_id_out_of_range"),
        ({"prompt": [259]}, "token_id_out_of_range"),
        ({"prompt": [10**30]}, "token_id_out_of_range"),
        ({"prompt": "a", "echo": True}, "unsupported_parameter"),
        ({"prompt": "a", "best_of": 3}, "unsupported_parameter"),
        ({"prompt": "a", "logprobs": 6}, "invalid_value"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "invalid_value"),
    ],
)
def test_completions_that_cannot_be_served(
    endpoint: Endpoint, fields: dict[str, Any], code: str
) -> None:
    assert refused(endpoint.complete(**fields), 400)["code"] == code
    assert not endpoint.backend.requests


def test_prompts_over_the_limit_name_both_numbers(endpoint: Endpoint) -> None:
    most = LIMITS.max_model_len
    assert endpoint.complete(prompt=[65] * (most - 1)).status_code == 200
    for fields in ({"prompt": [65] * (most + 1)}, {"prompt": [65] * 90, "max_tokens": 11}):
        error = refused(endpoint.complete(**fields), 400)
        assert error["code"] == "context_length_exceeded"
        assert str(most) in error["message"]
        assert str(len(fields["prompt"])) in error["message"]
    assert len(endpoint.backend.requests) == 1


def test_a_lone_surrogate_is_no_text(endpoint: Endpoint) -> None:
    content = b'{"model": "pocket", "prompt": "\\ud800"}'
    refused(endpoint.request("POST", "/v1/completions", content=content), 400)


def test_bodies_over_the_limit_announced_or_not(endpoint: Endpoint) -> None:
    large = json.dumps({"model": MODEL, "prompt": "a" * LIMITS.max_body_bytes}).encode()

    async def unannounced():
        for start in range(0, len(large), 1000):
            yield large[start : start + 1000]

    for content in (large, unannounced()):
        error = refused(endpoint.request("POST", "/v1/completions", content=content), 413)
        assert str(LIMITS.max_body_bytes) in error["message"]


def test_unknown_models_and_paths(endpoint: Endpoint) -> None:
    assert refused(endpoint.chat(model="gpt-9"), 404)["code"] == "model_not_found"
    refused(endpoint.request("GET", "/v1/models/gpt-9"), 404)
    refused(endpoint.request("GET", "/v2"), 404)
    refused(endpoint.request("GET", "/v1/completions"), 405)


def test_keys(tmp_path: Path) -> None:
    guarded = Endpoint(tmp_path, api_keys=("first", "second"))
    for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic first"}):
        error = refused(guarded.request("GET", "/v1/models", headers=headers), 401)
        assert error["code"] == "invalid_api_key"
    for key in ("first", "second"):
        headers = {"Authorization": f"Bearer {key}"}
        assert guarded.request("GET", "/v1/models", headers=headers).status_code == 200
    assert guarded.request("GET", "/health").status_code == 200


def test_a_key_file_has_one_a_line(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text("# of the team\nfirst\n\n second \n")
    assert read_api_keys(path) == ("first", "second")
    path.write_text("# none yet\n")
    with pytest.raises(ConfigurationError, match="holds no key"):
        read_api_keys(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_api_keys(tmp_path / "none")
    assert read_api_keys(None) == ()


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (QueueFullError(9, retry_after=7), 429, "queue_full", "7"),
        (OutOfPagesError(9, 1, 4), 429, "busy", "5"),
        (PromptTooLongError("shorten it"), 400, "context_length_exceeded", None),
        (UnavailableError("send it again"), 503, "unavailable", "5"),
        (RuntimeError("secret"), 500, "internal_error", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_the_backend_raises_at_once_is_a_status(
    endpoint: Endpoint, stream: bool, error: Exception, status: int, code: str, retry: str | None
) -> None:
    endpoint.backend.error = error
    answer = endpoint.chat(stream=stream)
    assert refused(answer, status)["code"] == code
    assert answer.headers.get("retry-after") == retry
    assert "secret" not in answer.text


def test_a_stream_that_fails_half_way_says_so_and_ends(endpoint: Endpoint) -> None:
    endpoint.backend.error = RuntimeError("secret")
    endpoint.backend.error_after = 0
    endpoint.backend.prefill_seconds = 0.1
    answer = endpoint.chat(stream=True)
    assert answer.status_code == 200
    *_, failure, end = [line for line in answer.text.splitlines() if line.startswith("data: ")]
    assert json.loads(failure[6:])["error"]["code"] == "internal_error"
    assert end == "data: [DONE]"
    assert "secret" not in answer.text
    assert endpoint.backend.closed
