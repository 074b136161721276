"""The endpoint as its clients see it: honest ones, and those that leave, dawdle or overdo it."""

import json
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from urllib.parse import urlsplit

import httpx

from ..endpoint import Endpoint
from ..events import Event, LineSplitter, StreamError, read_event
from ..prompts import SHORT_ANSWER, Prompt

_CONNECT_SECONDS = 10.0
_PROBE_SECONDS = 5.0
_USAGE = "longreach_kv_cache_usage_perc"


@dataclass(frozen=True)
class Outcome:
    """How one request ended, as its client saw it. `error` is None where it was answered whole."""

    prompt: Prompt
    text: str
    seconds: float
    max_tokens: int
    error: str | None = None

    @property
    def is_right(self) -> bool:
        """Answered whole, and with the key."""
        return self.error is None and self.prompt.is_answered_by(self.text)


class Client(Endpoint):
    """Speaks to one endpoint of Longreach. May be used by many threads at once."""

    def ask(
        self,
        prompt: Prompt,
        timeout: float,
        max_tokens: int = SHORT_ANSWER,
        decoding: threading.Event | None = None,
    ) -> Outcome:
        """Stream one greedy answer of `max_tokens` tokens at most; a long one has them all.

        Whatever goes wrong is an outcome, not an exception.

        Args:
            timeout: seconds after which it is given up.
            decoding: set at the first text.
        """
        started = time.monotonic()
        text, error = "", None
        try:
            for event in self._stream(prompt, max_tokens, timeout):
                text += event.text
                if text and decoding is not None:
                    decoding.set()
        except (httpx.HTTPError, StreamError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        return Outcome(prompt, text, time.monotonic() - started, max_tokens, error)

    def _stream(self, prompt: Prompt, max_tokens: int, timeout: float) -> Iterator[Event]:
        """The events of an answer; raises `StreamError` where it does not end as it should."""
        deadline = time.monotonic() + timeout
        limits = httpx.Timeout(timeout, connect=_CONNECT_SECONDS)
        body = self._body(prompt, max_tokens)
        with (
            httpx.Client(timeout=limits) as http,
            http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as answer,
        ):
            if answer.status_code != 200:
                raise StreamError(f"{answer.status_code} {answer.read()[:300]!r}")
            splitter = LineSplitter()
            for part in answer.iter_bytes():
                if time.monotonic() > deadline:
                    raise StreamError(f"no end within {timeout:.0f} s")
                for event in map(read_event, splitter.lines(part)):
                    if event is None:
                        continue
                    if event.is_end:
                        return
                    yield event
        raise StreamError("the stream ended early")

    def _body(self, prompt: Prompt, max_tokens: int) -> dict[str, object]:
        return self.chat_body(prompt.text, max_tokens, whole=max_tokens > SHORT_ANSWER)

    def is_ready(self) -> bool:
        """Whether `/ready` says so."""
        try:
            return httpx.get(f"{self.url}/ready", timeout=_PROBE_SECONDS).status_code == 200
        except httpx.HTTPError:
            return False

    def health_seconds(self) -> float | None:
        """How long `/health` takes to answer 200; None where it does not."""
        started = time.monotonic()
        try:
            status = httpx.get(f"{self.url}/health", timeout=_PROBE_SECONDS).status_code
        except httpx.HTTPError:
            return None
        return time.monotonic() - started if status == 200 else None

    def metrics(self) -> dict[tuple[str, str], float] | None:
        """(metric, role) -> value, summed over other labels; None where nobody answers."""
        try:
            answer = httpx.get(f"{self.url}/metrics", timeout=_PROBE_SECONDS)
        except httpx.HTTPError:
            return None
        return parse_metrics(answer.text) if answer.status_code == 200 else None

    def page_usage(self) -> dict[str, float] | None:
        """Share of KV pages in use by role; None where nobody answers."""
        metrics = self.metrics()
        if metrics is None:
            return None
        return {role: value for (name, role), value in metrics.items() if name == _USAGE}

    def post_and_leave(self, prompt: Prompt, seconds: float) -> None:
        """Send a request, and close the connection after so many seconds, answered or not."""
        with self.connect() as connection:
            connection.sendall(self.raw_chat(prompt, SHORT_ANSWER))
            time.sleep(seconds)

    def connect(self) -> socket.socket:
        """A connection of one's own."""
        parts = urlsplit(self.url)
        assert parts.hostname is not None
        return socket.create_connection((parts.hostname, parts.port or 80), _CONNECT_SECONDS)

    def raw_chat(self, prompt: Prompt, max_tokens: int) -> bytes:
        """The bytes of a request."""
        content = json.dumps(self._body(prompt, max_tokens)).encode()
        head = (
            "POST /v1/chat/completions HTTP/1.1\r\n"
            f"Host: {urlsplit(self.url).netloc}\r\nContent-Type: application/json\r\n"
            f"Content-Length: {len(content)}\r\n\r\n"
        )
        return head.encode() + content

    def completion_body(self, text: str) -> bytes:
        """What asks for a completion of this text. Made apart: of megabytes it takes a while."""
        return json.dumps({"model": self.model, "prompt": text, "max_tokens": 1}).encode()

    def post(self, content: bytes, timeout: float) -> tuple[int | None, float]:
        """Post a completion's body; its status, None without one, and the seconds it took."""
        started = time.monotonic()
        try:
            answer = httpx.post(
                f"{self.url}/v1/completions",
                content=content,
                headers={"Content-Type": "application/json"},
                timeout=timeout,
            )
        except httpx.HTTPError:
            return None, time.monotonic() - started
        return answer.status_code, time.monotonic() - started


def parse_metrics(text: str) -> dict[tuple[str, str], float]:
    """(metric, role) -> value, summed over other labels, of Prometheus's text format."""
    values: dict[tuple[str, str], float] = {}
    for line in text.splitlines():
        if line.startswith("#") or "{" not in line:
            continue
        name, _, rest = line.partition("{")
        labels, _, value = rest.rpartition("} ")
        role = labels.partition('role="')[2].partition('"')[0]
        values[name, role] = values.get((name, role), 0.0) + float(value.split()[0])
    return values
