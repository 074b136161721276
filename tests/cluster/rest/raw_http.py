"""HTTP byte by byte, as clients speak it that no library stands for."""

import json
import socket
import time
from dataclasses import dataclass


@dataclass(frozen=True)
class Answer:
    """One response as it came; `body` is whole, chunks joined."""

    status: int
    headers: list[tuple[str, str]]
    body: bytes

    def all(self, name: str) -> list[str]:
        """Every value of a header."""
        return [value for key, value in self.headers if key == name]

    @property
    def json(self) -> dict:
        return json.loads(self.body)


class Connection:
    """A connection, read one response at a time."""

    def __init__(self, port: int, seconds: float = 30) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=seconds)
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> "Connection":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, data: bytes) -> None:
        self.socket.sendall(data)

    def stop_sending(self) -> None:
        self.socket.shutdown(socket.SHUT_WR)

    def read_line(self) -> bytes:
        return self._file.readline()

    def answer(self, has_body: bool = True) -> Answer:
        """The next response."""
        status = int(self._file.readline().split()[1])
        headers: list[tuple[str, str]] = []
        while line := self._file.readline().strip():
            name, _, value = line.decode("latin-1").partition(":")
            headers.append((name.lower(), value.strip()))
        known = dict(headers)
        if not has_body or status in (100, 204):
            return Answer(status, headers, b"")
        if known.get("transfer-encoding") == "chunked":
            return Answer(status, headers, self._chunks())
        if "content-length" in known:
            return Answer(status, headers, self._file.read(int(known["content-length"])))
        return Answer(status, headers, self._file.read())

    def is_closed_within(self, seconds: float) -> bool:
        """Whether the other side closes without a word."""
        self.socket.settimeout(seconds)
        try:
            return self._file.read(1) == b""
        except TimeoutError:
            return False
        except ConnectionResetError:
            return True

    def _chunks(self) -> bytes:
        data = b""
        while size := int(self._file.readline(), 16):
            data += self._file.read(size)
            self._file.readline()
        self._file.readline()
        return data


def post(path: str, body: object, *headers: str, version: str = "1.1") -> bytes:
    """A request with a JSON body."""
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [
        f"POST {path} HTTP/{version}", "Host: 127.0.0.1", "Content-Type: application/json",
        f"Content-Length: {len(data)}", *headers,
    ]  # fmt: skip
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + data


def check_the_front(port: int, prompt: dict) -> None:
    """What any front of the endpoint must do right.

    Args:
        prompt: the body of a completion that is answered.
    """
    for check in (
        _upgrades_are_not_made, _a_body_may_come_later, _expectations, _pipelining,
        _half_closed, _http_1_0_streams, _heads_and_options, _request_ids, _nonsense,
    ):  # fmt: skip
        check(port, prompt)


def _upgrades_are_not_made(port: int, prompt: dict) -> None:
    h2c = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with Connection(port) as client:
        client.send(post("/v1/completions", prompt, *h2c))
        assert client.answer().status == 200
        client.send(post("/tokenize", {"prompt": "ab"}, *h2c))
        assert client.answer().json["count"] == 2


def _a_body_may_come_later(port: int, prompt: dict) -> None:
    h2c = ("Connection: Upgrade, HTTP2-Settings", "Upgrade: h2c", "HTTP2-Settings: AAMAAABk")
    with Connection(port) as client:
        head, _, body = post("/tokenize", {"prompt": "ab"}, *h2c).partition(b"\r\n\r\n")
        client.send(head + b"\r\n\r\n")
        time.sleep(0.2)
        client.send(body[:5])
        time.sleep(0.2)
        client.send(body[5:])
        assert client.answer().json["count"] == 2


def _expectations(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        head, _, body = post("/tokenize", {"prompt": "ab"}, "Expect: 100-continue").partition(
            b"\r\n\r\n"
        )
        client.send(head + b"\r\n\r\n")
        assert client.answer().status == 100
        client.send(body)
        assert client.answer().json["count"] == 2


def _pipelining(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        client.send(
            post("/tokenize", {"prompt": "a"})
            + b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
            + post("/tokenize", {"prompt": "abc"})
        )
        assert client.answer().json["count"] == 1
        assert client.answer().json == {"status": "alive"}
        assert client.answer().json["count"] == 3


def _half_closed(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        client.send(b"GET /v1/models HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        client.stop_sending()
        assert client.answer().status == 200
        assert client.is_closed_within(10)
    with Connection(port) as client:  # taken for one that left
        client.send(post("/v1/completions", prompt))
        client.stop_sending()
        assert client.is_closed_within(10)


def _http_1_0_streams(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        client.send(post("/v1/completions", {**prompt, "stream": True}, version="1.0"))
        answer = client.answer()
    assert answer.status == 200
    assert not answer.all("transfer-encoding")
    assert answer.body.rstrip().endswith(b"data: [DONE]")
    assert all(line[:1] in (b"", b"d", b":") for line in answer.body.splitlines())


def _heads_and_options(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        for path in ("/health", "/ready"):
            client.send(f"HEAD {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            assert client.answer(has_body=False).status == 200
        for path in ("/", "*", "/v1/completions"):
            client.send(f"OPTIONS {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
            answer = client.answer()
            assert answer.status == 204
            assert "POST" in answer.all("allow")[0]


def _request_ids(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        for sent, is_kept in (("mine-1", True), ("not fit", False), ("x" * 200, False)):
            for path, body in (("/v1/completions", prompt), ("/v1/completions", {"model": 1})):
                client.send(post(path, body, f"X-Request-ID: {sent}"))
                [one] = client.answer().all("x-request-id")
                assert (one == sent) == is_kept
                assert one


def _nonsense(port: int, prompt: dict) -> None:
    with Connection(port) as client:
        client.send(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n")
        assert client.answer().status == 400
    with Connection(port) as client:
        client.send(post("/tokenize", b'{"prompt": '))
        assert client.answer().status == 400
        client.send(post("/tokenize", {"prompt": "ab"}))
        assert client.answer().json["count"] == 2
