"""Real connections: OpenAI's own clients, clients that leave, and failures nobody foresaw."""

import asyncio
import http.client
import json
import logging
from collections.abc import AsyncGenerator, Iterator

import openai
import pytest

from longreach.engine.errors import CancelledElsewhereError
from longreach.engine.messages import Event, Finished, GenerationRequest
from longreach.engine.text.tokenizer import Tokenizer

from .backend import MODEL, Endpoint, ScriptedBackend
from .server import serving, wait_for

BODY = {"model": MODEL, "prompt": "Well?"}


@pytest.fixture
def port(endpoint: Endpoint) -> Iterator[int]:
    """Of a real server."""
    with serving(endpoint.api) as port:
        yield port


def outcomes(endpoint: Endpoint) -> dict[str, float]:
    """How many requests ended how."""
    lines = endpoint.request("GET", "/metrics").text.splitlines()
    counts = [line for line in lines if line.startswith("longreach_requests_total{")]
    return {line.split('outcome="')[1].split('"')[0]: float(line.split()[-1]) for line in counts}


def send(port: int, body: object, path: str = "/v1/completions") -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def test_openais_client(endpoint: Endpoint, port: int) -> None:
    endpoint.backend.prefill_seconds = 0.1
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        assert client.models.list().data[0].id == MODEL
        stream = client.chat.completions.create(
            model=MODEL,
            messages=[{"role": "user", "content": "Well?"}],
            stream=True,
            stream_options={"include_usage": True},
        )
        *chunks, last = stream
        assert "".join(c.choices[0].delta.content or "" for c in chunks) == "Yes."
        assert last.usage is not None
        assert last.usage.completion_tokens == 4
        whole = client.completions.create(model=MODEL, prompt=[65, 66], n=2, stop="x", logprobs=2)
        assert [choice.text for choice in whole.choices] == ["Yes.", "Yes."]
        with pytest.raises(openai.BadRequestError) as refused:
            client.completions.create(model=MODEL, prompt=[65] * 101)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError):
            client.completions.create(model="gpt-9", prompt="a")


def test_openais_asynchronous_client(port: int) -> None:
    async def ask() -> list[str | None]:
        url = f"http://127.0.0.1:{port}/v1"
        async with openai.AsyncOpenAI(base_url=url, api_key="none") as client:
            answers = await asyncio.gather(
                *(
                    client.chat.completions.create(
                        model=MODEL, messages=[{"role": "user", "content": "Well?"}]
                    )
                    for _ in range(8)
                )
            )
        return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask()) == ["Yes."] * 8


def test_openais_client_is_told_that_a_stream_failed(endpoint: Endpoint, port: int) -> None:
    endpoint.backend.prefill_seconds = 0.1
    endpoint.backend.error = RuntimeError("secret")
    endpoint.backend.error_after = 0
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        stream = client.completions.create(model=MODEL, prompt="Well?", stream=True)
        with pytest.raises(openai.APIError, match="its log says why"):
            list(stream)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_stops_the_work(endpoint: Endpoint, port: int, stream: bool) -> None:
    endpoint.backend.prefill_seconds = 60
    connection = send(port, {**BODY, "stream": stream})
    if stream:
        assert connection.getresponse().readline().startswith(b": prefill")
    wait_for(lambda: endpoint.backend.requests)
    assert not endpoint.backend.closed
    connection.close()
    wait_for(lambda: endpoint.backend.closed)
    wait_for(lambda: outcomes(endpoint).get("cancelled") == 1)
    running = 'longreach_num_requests_running{model_name="pocket",role="ingress"} 0.0'
    assert running in endpoint.request("GET", "/metrics").text


@pytest.mark.parametrize("path", ["/v1/completions", "/tokenize"])
def test_a_client_that_leaves_within_its_request_is_no_failure(
    endpoint: Endpoint, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def call() -> list[dict]:
        messages = [
            {"type": "http.request", "body": b"{", "more_body": True},
            {"type": "http.disconnect"},
        ]
        sent: list[dict] = []

        async def receive() -> dict:
            return messages.pop(0)

        async def send(message) -> None:
            sent.append(dict(message))

        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(),
            "query_string": b"", "headers": [(b"content-type", b"application/json")],
            "http_version": "1.1", "scheme": "http",
            "server": ("here", 80), "client": ("there", 1), "root_path": "",
        }  # fmt: skip
        await endpoint.api(scope, receive, send)
        return sent

    with caplog.at_level(logging.WARNING):
        assert asyncio.run(call())[0]["status"] == 499
    assert not caplog.records
    assert not endpoint.backend.requests
    assert outcomes(endpoint) == ({"cancelled": 1} if path != "/tokenize" else {})


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_ends_early_is_not_passed_off_as_whole(
    endpoint: Endpoint, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = ScriptedBackend.generate

    async def cut(self: ScriptedBackend, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        async for event in whole(self, request):
            if not isinstance(event, Finished):
                yield event

    monkeypatch.setattr(ScriptedBackend, "generate", cut)
    answer = endpoint.complete(stream=stream)
    assert "ended early" in answer.text
    assert answer.status_code == (200 if stream else 503)
    assert answer.text.rstrip().endswith("data: [DONE]" if stream else "}")
    assert outcomes(endpoint) == {"failed": 1}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("after", [None, 1])
def test_a_cancellation_that_nobody_asked_for_is_an_error(
    endpoint: Endpoint, port: int, stream: bool, after: int | None
) -> None:
    """The client is there, and waits."""
    endpoint.backend.error, endpoint.backend.error_after = asyncio.CancelledError(), after
    answer = send(port, {**BODY, "stream": stream}).getresponse()
    assert answer.status == (200 if stream and after is not None else 503)
    assert b'"unavailable"' in answer.read()
    wait_for(lambda: outcomes(endpoint) == {"failed": 1})


def test_a_client_that_left_is_not_taken_for_an_error_of_ours(
    endpoint: Endpoint, port: int
) -> None:
    """Serve cancels what runs for it before we are told."""

    async def cut(self: ScriptedBackend, request: GenerationRequest) -> AsyncGenerator[Event, None]:
        self.requests.append(request)
        await left.wait()
        raise CancelledElsewhereError
        yield  # makes this a generator

    left = asyncio.Event()
    scope_gone = asyncio.Event()

    async def call() -> None:
        messages = [{"type": "http.request", "body": json.dumps(BODY).encode(), "more_body": False}]

        async def receive() -> dict:
            if messages:
                return messages.pop(0)
            await scope_gone.wait()
            return {"type": "http.disconnect"}

        async def nothing(message: object) -> None:
            raise AssertionError("nobody is there")

        scope = {
            "type": "http", "method": "POST", "path": "/v1/completions",
            "raw_path": b"/v1/completions", "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
            "scheme": "http", "server": ("here", 80), "client": ("there", 1), "root_path": "",
        }  # fmt: skip
        call = asyncio.create_task(endpoint.api(scope, receive, nothing))
        while not endpoint.backend.requests:
            await asyncio.sleep(0.01)
        left.set()
        await asyncio.sleep(0.05)
        scope_gone.set()
        await call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ScriptedBackend, "generate", cut)
        asyncio.run(call())
    assert outcomes(endpoint) == {"cancelled": 1}


def test_an_os_error_of_ours_is_not_taken_for_a_client_that_left(
    endpoint: Endpoint, port: int
) -> None:
    endpoint.backend.error = OSError("no space left")
    assert send(port, BODY).getresponse().status == 500
    wait_for(lambda: outcomes(endpoint) == {"failed": 1})


@pytest.mark.parametrize("stream", [False, True])
def test_a_bug_in_formatting_is_a_clean_failure(
    endpoint: Endpoint, stream: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr("longreach.cluster.rest.answers._finish_reason", broken)
    answer = endpoint.complete(stream=stream)
    assert "internal_error" in answer.text
    assert "secret" not in answer.text
    assert answer.status_code == (200 if stream else 500)
    assert outcomes(endpoint) == {"failed": 1}


def test_an_unexpected_failure_is_clean_and_carries_its_request_id(
    endpoint: Endpoint, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_) -> None:
        raise RuntimeError("secret")

    monkeypatch.setattr(Tokenizer, "encode", broken)
    answer = endpoint.request(
        "POST", "/tokenize", json={"prompt": "a"}, headers={"x-request-id": "mine"}
    )
    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert answer.headers["x-request-id"] == "mine"
    assert "secret" not in answer.text
    assert "failed unexpectedly" in caplog.text
