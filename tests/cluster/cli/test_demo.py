"""The demonstration against a scripted endpoint over real HTTP."""

import io
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from rich.console import Console

from longreach.cluster import metrics as m
from longreach.cluster.cli.demo import DemoOptions, ask_for_hidden_key, is_right, show, show_urls
from longreach.cluster.client import Endpoint, EndpointError
from longreach.engine.messages import Progress


class ScriptedServer(ThreadingHTTPServer):
    """Counts bytes as tokens, and answers with the key, or with what `answer` says instead."""

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.metrics = m.Metrics(folder, role="ingress", model_name="scripted")
        self.answer: str | None = None
        self.failure: dict[str, str] | None = None
        self.authorization: str | None = None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: ScriptedServer  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            self.reply({"object": "list", "data": [{"id": "scripted", "object": "model"}]})
        elif self.path == "/metrics":
            self.reply(m.render(self.server.folder), m.CONTENT_TYPE)
        else:
            self.reply({"status": "ready"})

    def do_POST(self) -> None:
        self.server.authorization = self.headers["Authorization"]
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        content = body["messages"][0]["content"]
        tokens = len(content.encode()) + 11
        if self.path == "/tokenize":
            self.reply({"count": tokens})
        elif self.server.failure:
            self.reply({"error": self.server.failure}, status=400)
        else:
            self.stream(content, tokens)

    def stream(self, content: str, tokens: int) -> None:
        self.server.metrics.observe(m.REQUEST_QUEUE_TIME, 0.25, prompt_class="8k")
        self.server.metrics.observe(m.REQUEST_PREFILL_TIME, 2.0, prompt_class="8k")
        self.server.metrics.add(m.PREFILL_STAGE_SECONDS, 1.5, stage="attention")
        found = re.search(r"pass key is (\d+)", content)
        assert found
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        # Comments come in pieces, as they may over a network.
        for piece in (": prefill 0% 0/", f"{tokens}\n\n: pref", f"ill 100% {tokens}/{tokens}\n\n"):
            self.wfile.write(piece.encode())
            self.wfile.flush()
        for text in ("It is ", self.server.answer or found[1]):
            self.event({"choices": [{"index": 0, "delta": {"content": text}}]})
        self.event({"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]})
        usage = {"prompt_tokens": tokens, "completion_tokens": 2, "total_tokens": tokens + 2}
        self.event({"choices": [], "usage": usage})
        self.wfile.write(b"data: [DONE]\n\n")

    def event(self, fields: dict) -> None:
        chunk = {"id": "1", "object": "chat.completion.chunk", "created": 1, "model": "scripted"}
        self.wfile.write(f"data: {json.dumps({**chunk, **fields})}\n\n".encode())

    def reply(self, body: object, kind: str = "application/json", status: int = 200) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ScriptedServer]:
    with ScriptedServer(tmp_path) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield server
        server.shutdown()


def plain_console() -> tuple[Console, io.StringIO]:
    output = io.StringIO()
    return Console(file=output, width=100), output


def test_the_whole_demonstration(server: ScriptedServer) -> None:
    console, output = plain_console()
    report = ask_for_hidden_key(server.url, DemoOptions(5000, seed=3), 1.0, console, "secret")
    assert server.authorization == "Bearer secret"
    assert report.correct
    assert report.prompt_tokens == 5000
    assert report.answer == f"It is {report.expected}"
    assert (report.queue, report.prefill, report.hand_off) == (0.25, 2.0, 0.0)
    assert report.stages == {"attention": 1.5}
    assert report.prefill_tokens_per_second == 2500
    assert json.loads(report.to_json())["seed"] == 3
    show(report, console)
    show_urls(report.url, report.model, console)
    shown = output.getvalue()
    assert "prefill 100 %  5,000 of 5,000 tokens" in shown
    assert f"expected   {report.expected}: right" in shown
    assert f"{server.url}/metrics" in shown


def test_only_the_growth_of_metrics_counts(server: ScriptedServer) -> None:
    console, _ = plain_console()
    ask_for_hidden_key(server.url, DemoOptions(1000, seed=1), 1.0, console)
    report = ask_for_hidden_key(server.url, DemoOptions(1000, seed=1), 1.0, console)
    assert report.prefill == 2.0
    assert report.stages == {"attention": 1.5}


def test_a_wrong_answer_is_said_to_be_wrong(server: ScriptedServer) -> None:
    server.answer = "00000"
    console, output = plain_console()
    report = ask_for_hidden_key(server.url, DemoOptions(1000, seed=1), 1.0, console)
    show(report, console)
    assert not report.correct
    assert ": wrong" in output.getvalue()


def test_what_the_endpoint_refuses_is_told_in_its_words(server: ScriptedServer) -> None:
    server.failure = {"message": "too long by 7", "type": "invalid_request_error"}
    console, _ = plain_console()
    with pytest.raises(EndpointError, match=r"refused with 400: .*too long by 7"):
        ask_for_hidden_key(server.url, DemoOptions(1000, seed=1), 1.0, console)


def test_nobody_there() -> None:
    endpoint = Endpoint("http://127.0.0.1:9")
    with pytest.raises(EndpointError):
        endpoint.first_model()
    with pytest.raises(EndpointError):
        endpoint.ask("any", [{"role": "user", "content": "hi"}], 1, lambda progress: None)


def test_a_terminal_gets_a_bar(server: ScriptedServer) -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    ask_for_hidden_key(server.url, DemoOptions(1000, seed=1), 1.0, console)
    assert "1,000 of 1,000 tokens" in output.getvalue()


def test_progress_comments_reach_the_caller(server: ScriptedServer) -> None:
    seen: list[Progress] = []
    message = {"role": "user", "content": "The pass key is 12345."}
    Endpoint(server.url).ask("scripted", [message], 8, seen.append)
    assert [progress.done for progress in seen] == [0, seen[0].total]


@pytest.mark.parametrize(
    ("answer", "right"),
    [("12345", True), ("The pass key is 12345.", True), ("54321 or 12345", False), ("", False),
     ("123456", False)],
)  # fmt: skip
def test_is_right(answer: str, right: bool) -> None:
    assert is_right(answer, "12345") == right
