"""The front around a proxy that stands for Serve's: what it does to connections and answers."""

import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from longreach.cluster.front import (
    Departure,
    FrontLimits,
    FrontProtocol,
    TakenBodies,
    controller_options,
    depart,
    install,
)

from .backend import MODEL, Endpoint
from .raw_http import Connection, check_the_front, post
from .server import serving, wait_for

FRIEND = "https://friend.example"
LIMITS = FrontLimits(max_body_bytes=4096, receive_seconds=1.0, origins=(FRIEND,))
PROMPT = {"model": MODEL, "prompt": "Well?"}
HEADER_SECONDS = 1.0


class Proxy:
    """Passes requests on to the endpoint as Serve's does, or does what it is told to instead."""

    def __init__(self, api: ASGIApp) -> None:
        self.api = TakenBodies(api)
        self.received: list[int] = []
        self.instead: Callable[[Send], object] | None = None
        self.called = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.called += 1
        if not scope["path"].startswith("/"):
            for message in said(404, b"text/plain", b"Path not found"):
                await send(message)
            return
        if self.instead is not None:
            for message in self.instead(send):  # type: ignore[attr-defined]
                await send(message)
            return

        async def send_with_another_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                given = dict(scope["headers"]).get(b"x-request-id", b"of serve")
                message["headers"] = [*message["headers"], (b"X-Request-ID", given)]
            await send(message)

        async def receive_and_count() -> Message:
            message = await receive()
            self.received.append(len(message.get("body", b"")))
            return message

        await self.api(scope, receive_and_count, send_with_another_id)


@pytest.fixture
def proxy(endpoint: Endpoint) -> Proxy:
    return Proxy(endpoint.api)


@pytest.fixture
def port(proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """Of the front, set up as a proxy of Serve's sets it up."""
    options = controller_options(LIMITS)
    assert options.runtime_env is not None
    for name, value in options.runtime_env["env_vars"].items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(FrontProtocol, "header_seconds", HEADER_SECONDS)
    monkeypatch.setattr("uvicorn.config.HTTP_PROTOCOLS", {})
    app: ASGIApp = proxy
    for middleware in install():
        app = middleware.cls(app, *middleware.args, **middleware.kwargs)
    with serving(app) as port:
        yield port


def test_http_as_clients_speak_it(port: int) -> None:
    check_the_front(port, PROMPT)


@pytest.mark.parametrize("ahead_bytes", [16, 1 << 16])
def test_an_ingress_need_not_ask_for_a_small_body(
    port: int, proxy: Proxy, monkeypatch: pytest.MonkeyPatch, ahead_bytes: int
) -> None:
    monkeypatch.setattr("longreach.cluster.front._AHEAD_BYTES", ahead_bytes)
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT))
        answer = client.answer()
    assert (answer.status, answer.json["object"]) == (200, "text_completion")
    came = [size for size in proxy.received if size]
    assert came == ([] if ahead_bytes > 16 else [len(json.dumps(PROMPT))])


def test_headers_that_never_end_are_given_up(port: int) -> None:
    with Connection(port) as silent, Connection(port) as slow, Connection(port) as second:
        slow.send(b"GET /health HTTP/1.1\r\nHost: ")
        second.send(b"GET /health HTTP/1.1\r\nHost: a\r\n\r\n")
        assert second.answer().status == 200
        second.send(b"GET /hea")
        for client in (silent, slow, second):
            assert client.is_closed_within(HEADER_SECONDS + 5)


def test_slow_answers_are_not_given_up(endpoint: Endpoint, port: int) -> None:
    endpoint.backend.prefill_seconds = 2 * HEADER_SECONDS
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT))
        assert client.answer().status == 200


def test_a_body_that_never_ends_does_not_reach_serve(proxy: Proxy, port: int) -> None:
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT)[:-1])
        answer = client.answer()
        assert (answer.status, answer.json["error"]["code"]) == (408, "body_too_slow")
        assert client.is_closed_within(5)
    with Connection(port) as client:
        client.send(post("/v1/completions", {"prompt": "a" * LIMITS.max_body_bytes}))
        assert client.answer().json["error"]["code"] == "body_too_large"
    assert not proxy.called


def test_of_too_many_that_send_no_whole_headers_the_oldest_is_closed(
    port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nobody else, however many come: not who is being answered, nor who has been."""
    monkeypatch.setattr(FrontProtocol, "header_seconds", 60.0)
    monkeypatch.setattr(FrontProtocol, "most_awaited", 3)
    with ExitStack() as stack:
        answered = stack.enter_context(Connection(port))
        answered.send(post("/v1/completions", PROMPT))
        assert answered.answer().status == 200
        slow = []
        for _ in range(5):
            slow.append(stack.enter_context(Connection(port)))
            slow[-1].send(b"POST /v1/completions HTTP/1.1\r\nHost:")
        for each in slow[:2]:
            assert each.is_closed_within(5)
        slow[2].send(b" 127.0.0.1\r\n\r\n")
        assert slow[2].answer().status >= 400
        answered.send(post("/v1/completions", PROMPT))
        assert answered.answer().status == 200


def test_a_client_that_leaves_stops_the_work(endpoint: Endpoint, port: int) -> None:
    endpoint.backend.prefill_seconds = 60
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT))
        wait_for(lambda: endpoint.backend.requests)
    wait_for(lambda: endpoint.backend.closed)


def test_a_proxy_that_is_to_go_counts_its_requests_and_sees_its_clients_off(
    endpoint: Endpoint, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whose next requests come by new connections; those that are under way are answered."""
    monkeypatch.setattr(Departure, "begun", False)
    request = post("/v1/completions", PROMPT)
    with Connection(port) as answered, Connection(port) as sending:
        answered.send(request)
        kept = answered.answer()
        assert (kept.status, kept.all("connection")) == (200, [])
        sending.send(request[:-1])
        wait_for(lambda: Departure.under_way == 1)
        endpoint.backend.prefill_seconds = 0.5
        answered.send(request)
        wait_for(lambda: Departure.under_way == 2)
        assert depart(None) == 2
        sending.send(request[-1:])
        for client in (answered, sending):
            last = client.answer()
            assert (last.status, last.all("connection")) == (200, ["close"])
            assert client.is_closed_within(5)
    wait_for(lambda: depart(None) == 0)


def test_a_proxy_that_is_to_go_closes_connections_that_have_fallen_idle(
    endpoint: Endpoint, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their clients would come again by them when the node is gone; who is about to ask may."""
    monkeypatch.setattr(Departure, "begun", False)
    monkeypatch.setattr(FrontProtocol, "header_seconds", 60.0)
    request = post("/v1/completions", PROMPT)
    with ExitStack() as stack:
        idle, asking, pipelined, new = (stack.enter_context(Connection(port)) for _ in range(4))
        for client in (idle, asking):
            client.send(request)
            assert client.answer().status == 200
        asking.send(request[:20])
        pipelined.send(request + request[:20])
        assert pipelined.answer().status == 200
        wait_for(lambda: len(FrontProtocol._awaited) == 2)  # those that ask, and have just come
        wait_for(lambda: Departure.under_way == 0)
        assert depart(None) == 0
        assert idle.is_closed_within(5)
        for client, rest in ((asking, request[20:]), (pipelined, request[20:]), (new, request)):
            client.send(rest)
            last = client.answer()
            assert (last.status, last.all("connection")) == (200, ["close"])


def said(status: int, kind: bytes, *bodies: bytes, whole: bool = True) -> list[Message]:
    headers = [(b"content-type", kind)]
    start: list[Message] = [{"type": "http.response.start", "status": status, "headers": headers}]
    parts: list[Message] = [
        {"type": "http.response.body", "body": body, "more_body": True} for body in bodies
    ]
    end: list[Message] = [{"type": "http.response.body", "body": b"", "more_body": False}]
    return start + parts + (end if whole else [])


@pytest.mark.parametrize(
    ("messages", "status", "code"),
    [
        ([], 503, "unavailable"),
        (said(404, b"text/plain", b"Path '/v1' not found"), 503, "not_ready"),
        (said(503, b"text/plain", b"Traceback"), 503, "unavailable"),
        (said(500, b"text/plain", b"Internal Server Error"), 503, "unavailable"),
        (said(408, b"text/plain", b"timed out"), 429, "busy"),
    ],
)
def test_what_serve_says_by_itself_has_our_shape(
    proxy: Proxy, port: int, messages: list[Message], status: int, code: str
) -> None:
    proxy.instead = lambda send: messages
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT, "X-Request-ID: mine"))
        answer = client.answer()
    assert (answer.status, answer.json["error"]["code"]) == (status, code)
    assert int(answer.all("retry-after")[0]) > 0
    assert answer.all("x-request-id") == ["mine"]
    assert b"Traceback" not in answer.body


def test_a_stream_whose_ingress_dies_ends_with_an_error(proxy: Proxy, port: int) -> None:
    begun = b'data: {"id": "1"}\n\n'
    proxy.instead = lambda send: said(200, b"text/event-stream", begun, whole=False)
    with Connection(port) as client:
        client.send(post("/v1/completions", {**PROMPT, "stream": True}))
        answer = client.answer()
    *_, failure, end = [line for line in answer.body.splitlines() if line]
    assert json.loads(failure[6:])["error"]["code"] == "unavailable"
    assert end == b"data: [DONE]"


def test_a_whole_answer_whose_ingress_dies_is_cut_off(proxy: Proxy, port: int) -> None:
    proxy.instead = lambda send: said(200, b"application/json", b'{"id"', whole=False)
    with Connection(port) as client:
        client.send(post("/v1/completions", PROMPT))
        with pytest.raises(ValueError, match="invalid literal"):  # no last chunk comes
            client.answer()


def test_serves_own_paths_are_left_alone(proxy: Proxy, port: int) -> None:
    proxy.instead = lambda send: said(503, b"text/plain", b"draining")
    with Connection(port) as client:
        client.send(b"GET /-/healthz HTTP/1.1\r\nHost: a\r\n\r\n")
        answer = client.answer()
    assert (answer.status, answer.body) == (503, b"draining")


@pytest.mark.parametrize(("origin", "readable"), [(FRIEND, True), ("https://evil.example", False)])
def test_pages_that_are_allowed_may_read_what_the_front_refuses(
    port: int, origin: str, readable: bool
) -> None:
    with Connection(port) as client:
        client.send(post("/tokenize", {"prompt": "a" * 5000}, f"Origin: {origin}"))
        refused = client.answer()
    assert refused.status == 413
    assert refused.all("access-control-allow-origin") == ([origin] if readable else [])
    assert ("retry-after" in "".join(refused.all("access-control-expose-headers"))) == readable
