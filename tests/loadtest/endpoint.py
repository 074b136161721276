"""An endpoint that answers as it is told to, in place of a cluster."""

import json
import re
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "scripted"
CHARACTERS_PER_TOKEN = 4
TEMPLATE_TOKENS = 10


@dataclass
class Script:
    """What the endpoint does next; may be changed while it runs.

    Attributes:
        answer: "right", "wrong", "empty" (no text), "cut" (no end), "error" (an event), "garbled"
            (no JSON), "refuse" (503), or "drop" (not a word).
        answers: one for each request in turn, in place of `answer`.
        seconds: before it answers.
        gap: seconds between one token and the next.
        noise: whether comments and events without text come first.
        slots: how many it answers at once; others wait.
        usage: share of KV pages that it claims to have in use, by role.
        lost_clients: how many were gone when their answer was ready.
        most_at_once: requests that were under way at the same time.
    """

    answer: str = "right"
    answers: Sequence[str] = ()
    seconds: float = 0.0
    gap: float = 0.0
    noise: bool = False
    slots: int = 1_000
    max_model_len: int | None = None
    usage: dict[str, float] = field(default_factory=lambda: {"prefill": 0.0, "decode": 0.0})
    lost_clients: int = 0
    requests: int = 0
    most_at_once: int = 0
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[Message] = field(default_factory=list)
    arrived: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.free = threading.Semaphore(self.slots)
        self._at_once = 0

    @contextmanager
    def asked(self, body: dict[str, Any], headers: Message) -> Iterator[str]:
        """One request is under way; gives what shall be answered."""
        with self.lock:
            answer = self.answers[self.requests % len(self.answers)] if self.answers else ""
            self.requests += 1
            self.bodies.append(body)
            self.headers.append(headers)
            self.arrived.append(time.monotonic())
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield answer or self.answer
        finally:
            with self.lock:
                self._at_once -= 1


@contextmanager
def scripted_endpoint(script: Script) -> Iterator[int]:
    """Answers on 127.0.0.1 until the end of the block; gives the port."""
    handler = type("Handler", (_Handler,), {"script": script})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    request_queue_size = 128


class _Handler(BaseHTTPRequestHandler):
    script: Script

    def do_GET(self) -> None:
        if self.path == "/metrics":
            usage = "longreach_kv_cache_usage_perc"
            lines = (
                f'{usage}{{model_name="m",role="{role}"}} {share}'
                for role, share in self.script.usage.items()
            )
            self._send("# HELP\n" + "\n".join(lines) + "\n")
        else:
            model = {"id": MODEL, "max_model_len": self.script.max_model_len}
            self._send(json.dumps({"data": [model]}))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["messages"][0]["content"] if "messages" in body else str(body["prompt"])
        if not body.get("stream"):
            usage = {"prompt_tokens": tokens_of(text), "completion_tokens": 1}
            self._send(json.dumps({"choices": [], "usage": usage}))
            return
        with self.script.asked(body, self.headers) as answer, self.script.free:
            time.sleep(self.script.seconds)
            if answer == "drop":
                self.close_connection = True
            elif answer == "refuse":
                self.send_error(503)
            else:
                self._answer(text, answer)

    def _answer(self, text: str, answer: str) -> None:
        try:
            self._stream(text, answer)
        except OSError:
            self.script.lost_clients += 1

    def _stream(self, text: str, answer: str) -> None:
        """Two texts of three tokens together, and usage, each with a gap before it."""
        key = (re.findall(r"The pass key is (\d+)", text) or ["1234"])[0]
        said = key if answer != "wrong" else str(int(key) + 1)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.end_headers()
        if self.script.noise:
            self._line(": prefill 10% 1/10")
            self._event(json.dumps({"choices": [], "prompt_progress": {"total": 10}}))
            self._event(json.dumps({"choices": [{"delta": {"role": "assistant", "content": ""}}]}))
            time.sleep(self.script.gap)
        if answer != "empty":
            self._say(said[:2])
        if answer == "error":
            self._event(json.dumps({"error": {"message": "a rank died"}}))
        if answer == "garbled":
            self._event("{")
        if answer in ("right", "wrong"):
            time.sleep(self.script.gap)
            self._say(f"{said[2:]}.")
        if answer in ("right", "wrong", "empty"):
            usage = {"prompt_tokens": tokens_of(text), "completion_tokens": 3}
            self._event(json.dumps({"choices": [], "usage": usage}))
            self._event("[DONE]")

    def _say(self, text: str) -> None:
        event = {"choices": [{"delta": {"content": text}}], "system_fingerprint": "a\u2028b"}
        # Not every endpoint escapes what ends a line for Unicode, and not for an event stream.
        self._event(json.dumps(event, ensure_ascii=False))

    def _event(self, data: str) -> None:
        self._line(f"data: {data}")

    def _line(self, line: str) -> None:
        self.wfile.write(f"{line}\n\n".encode())
        self.wfile.flush()

    def _send(self, text: str) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: tests say what went wrong."""


def tokens_of(text: str) -> int:
    """As the scripted model counts: four characters each, and a template of ten."""
    return len(text) // CHARACTERS_PER_TOKEN + TEMPLATE_TOKENS
