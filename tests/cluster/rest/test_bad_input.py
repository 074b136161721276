"""What is refused, with which status and words, and that nothing else happens."""

import json
import pickle
from pathlib import Path
from typing import Any

import httpx
import pytest

from longreach.cluster.rest import Access, read_api_keys
from longreach.cluster.rest.errors import RestError
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
        ({"top_p": -0.1}, "top_p"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 51}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"n": 5}, "n"),
        ({"seed": 2**70}, "seed"),
        ({"stop": ["x" * 1025]}, "stop.0"),
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
        ({"response_format": {"type": "xml"}}, "response_format"),
        ({"top_logprobs": 2}, "logprobs"),
        ({"logprobs": True, "top_logprobs": 6}, "at most 5"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "differ"),
        ({"stream_options": {"include_usage": 1}}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "narrator", "content": "x"}]}, "role"),
        ({"messages": [{"role": "user"}]}, "content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "text"),
        ({"messages": [{**USER, "colour": "red"}]}, "colour"),
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
        ({"prompt": [1, 2.5]}, "invalid_value"),
        ({"prompt": [[1], [True]]}, "invalid_value"),
        ({"prompt": [[1], []]}, "invalid_value"),
        ({"prompt": ["a", 1]}, "invalid_value"),
        ({"prompt": [[[1]]]}, "invalid_value"),
        ({"prompt": {"a": 1}}, "invalid_value"),
        ({"prompt": [-1]}, "token_id_out_of_range"),
        ({"prompt": [259]}, "token_id_out_of_range"),
        ({"prompt": [10**30]}, "token_id_out_of_range"),
        ({"prompt": [1, -(10**30)]}, "token_id_out_of_range"),
        ({"prompt": [[258], [1, 259]]}, "token_id_out_of_range"),
        ({"prompt": "a", "suffix": "b"}, "unsupported_parameter"),
        ({"prompt": "a", "best_of": 3}, "unsupported_parameter"),
        ({"prompt": "a", "logprobs": 6}, "invalid_value"),
        ({"prompt": ["a", "b", "c"], "n": 5}, "invalid_value"),
    ],
)
def test_completions_that_cannot_be_served(
    endpoint: Endpoint, fields: dict[str, Any], code: str
) -> None:
    assert refused(endpoint.complete(**fields), 400)["code"] == code
    assert not endpoint.backend.requests


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("completions", {"prompt": ["a"] * 9}, "prompt"),
        ("completions", {"prompt": ["a", "b"], "n": 5}, "n"),
        ("completions", {"prompt": "a" * 101}, "prompt"),
        ("completions", {"prompt": [65] * 90, "max_tokens": 11}, "prompt"),
        ("chat/completions", {"messages": [USER], "max_completion_tokens": 51},
         "max_completion_tokens"),
        ("chat/completions", {"messages": [USER], "max_tokens": 51}, "max_tokens"),
        ("chat/completions", {"messages": [USER], "top_logprobs": 1}, "top_logprobs"),
        ("chat/completions", {"messages": [USER], "max_tokens": 1, "max_completion_tokens": 2},
         "max_tokens"),
        ("chat/completions", {"messages": ["a"]}, "messages.0"),
        ("chat/completions", {"messages": [{"role": "user", "content": "a" * 101}]}, "messages"),
    ],
)  # fmt: skip
def test_the_field_that_is_wrong_is_named(
    endpoint: Endpoint, path: str, fields: dict[str, Any], param: str
) -> None:
    error = refused(endpoint.post(f"/v1/{path}", {"model": MODEL, **fields}), 400)
    assert error["param"] == param
    assert not endpoint.backend.requests


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize"])
@pytest.mark.parametrize("content", [b"[]", b"3", b'"text"'])
def test_errors_name_no_class_of_ours(endpoint: Endpoint, path: str, content: bytes) -> None:
    error = refused(endpoint.request("POST", path, content=content), 400)
    assert "Body" not in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "m" * 3000, "prompt": "a"},
        {"model": MODEL, "prompt": "a", "f" * 3000: 1},
        {"model": MODEL, "prompt": "a", "logit_bias": {"k" * 3000: 1}},
        {"model": MODEL, "prompt": [10**3000]},
        {"model": MODEL, "prompt": "a", "stop_token_ids": [10**3000]},
    ],
)
def test_errors_repeat_little_of_what_was_sent(endpoint: Endpoint, body: dict[str, Any]) -> None:
    answer = endpoint.post("/v1/completions", body)
    assert answer.status_code in (400, 404)
    assert len(answer.text) < 1000


def test_an_error_is_cut_wherever_it_comes_from_and_travels_whole() -> None:
    error = RestError(400, "m" * 9000, param="p" * 9000, headers={"Retry-After": "1"})
    assert len(error.message) <= 500
    assert len(error.param or "") <= 100
    assert pickle.loads(pickle.dumps(error)) == error


def test_long_paths_are_not_repeated(endpoint: Endpoint) -> None:
    assert len(endpoint.request("GET", "/v1/" + "a" * 3000).text) < 1000


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_only_json_is_read(endpoint: Endpoint, kind: str) -> None:
    error = refused(
        endpoint.request("POST", "/tokenize", content=b"{}", headers={"content-type": kind}), 415
    )
    assert error["code"] == "unsupported_media_type"
    utf8 = {"content-type": "Application/JSON; charset=utf-8"}
    assert endpoint.post("/tokenize", {"prompt": "a"}, headers=utf8).status_code == 200


@pytest.mark.parametrize(
    ("host", "origin", "status"),
    [
        ("here:8000", None, 200),
        ("HERE", None, 200),
        ("[::1]:8000", None, 200),
        ("evil.example", None, 403),
        ("here.evil.example", None, 403),
        ("here:8000", "http://here:8000", 200),
        ("here:8000", "https://friend.example", 200),
        ("here:8000", "http://evil.example", 403),
        ("here:8000", "http://here:9000", 403),
        ("here:8000", "null", 403),
    ],
)
def test_hosts_and_origins(tmp_path: Path, host: str, origin: str | None, status: int) -> None:
    access = Access(hosts=("here", "::1"), origins=("https://friend.example",))
    guarded = Endpoint(tmp_path, access)
    headers = {"host": host, **({"origin": origin} if origin else {})}
    answer = guarded.post("/v1/completions", {"model": MODEL, "prompt": "a"}, headers=headers)
    assert answer.status_code == status
    assert len(guarded.backend.requests) == (status == 200)


@pytest.mark.parametrize("host", ["10.0.0.7:8000", ""])
def test_probes_need_no_name(tmp_path: Path, host: str) -> None:
    guarded = Endpoint(tmp_path, Access(hosts=("here",)))
    statuses = {
        path: guarded.request("GET", path, headers={"host": host}).status_code
        for path in ("/health", "/ready", "/metrics", "/v1/models")
    }
    assert statuses == {"/health": 200, "/ready": 200, "/metrics": 403, "/v1/models": 403}


def test_a_page_that_is_allowed_may_ask_from_a_browser(tmp_path: Path) -> None:
    keyed = Access(("key",), origins=("https://friend.example",))
    guarded = Endpoint(tmp_path, keyed)
    asks = {
        "origin": "https://friend.example",
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = guarded.request("OPTIONS", "/v1/completions", headers=asks)
    assert answer.status_code == 200
    assert answer.headers["access-control-allow-origin"] == "https://friend.example"
    assert "authorization" in answer.headers["access-control-allow-headers"].lower()
    foreign = guarded.request(
        "OPTIONS", "/v1/completions", headers={**asks, "origin": "https://evil.example"}
    )
    assert foreign.status_code == 403
    assert guarded.request("OPTIONS", "/").status_code == 204


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
    guarded = Endpoint(tmp_path, Access(api_keys=("first", "second")))
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
    with pytest.raises(ConfigurationError):
        read_api_keys(path)
    with pytest.raises(ConfigurationError):
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
