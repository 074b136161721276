"""What one client may send, and that nobody else notices: a real server, and large bodies."""

import http.client
import itertools
import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.cluster.rest import SignsOfLife
from longreach.cluster.rest.errors import RestError
from longreach.cluster.rest.reader import LARGE_BYTES, Reader, longest_text

from . import backend
from .backend import MODEL, Endpoint
from .server import serving, wait_for

LONGEST = 131072
LATE_SECONDS = 0.25
_TRIES = 3
MB = 1 << 20
LIMITS = replace(
    backend.LIMITS,
    max_model_len=LONGEST,
    max_body_bytes=64 * MB,
    signs_of_life=SignsOfLife(0.1),
    receive_seconds=2.0,
)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Endpoint, int]]:
    """An endpoint for long prompts, and the port of its server, which is warm."""
    endpoint = Endpoint(tmp_path_factory.mktemp("large"), limits=LIMITS)
    with serving(endpoint.api) as port:
        assert post(port, "/tokenize", json.dumps({"prompt": "a" * LARGE_BYTES}))[0] == 200
        yield endpoint, port


def post(port: int, path: str, body: str | bytes) -> tuple[int, dict[str, Any]]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", path, body, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, json.loads(answer.read())


def latest_health(port: int, work: Callable[[], object]) -> float:
    """Seconds of the slowest `/health` while `work` runs."""
    slowest = 0.0
    with ThreadPoolExecutor(1) as others:
        done = others.submit(work)
        while not done.done():
            started = time.monotonic()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request("GET", "/health")
            assert connection.getresponse().status == 200
            connection.close()
            slowest = max(slowest, time.monotonic() - started)
            time.sleep(0.01)
        done.result()
    return slowest


def check_nobody_waits(port: int, work: Callable[[], object]) -> None:
    """A machine that does something else may be late once; what stops the loop is late always."""
    late = [latest_health(port, work)]
    while late[-1] >= LATE_SECONDS and len(late) < _TRIES:
        late.append(latest_health(port, work))
    assert min(late) < LATE_SECONDS


def reader_processes() -> list[int]:
    """Children of this process that read bodies."""
    children = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    found = [int(child) for path in children for child in path.read_text().split()]
    return [
        child for child in found if b"rest.reader" in Path(f"/proc/{child}/cmdline").read_bytes()
    ]


def chat(*contents: str) -> bytes:
    messages = [{"role": "user", "content": content} for content in contents]
    return json.dumps({"model": MODEL, "messages": messages}).encode()


def completion(prompt: object) -> bytes:
    return json.dumps({"model": MODEL, "prompt": prompt}).encode()


def many_ids() -> bytes:
    return b'{"model": "pocket", "prompt": [' + b",".join([b"65"] * 15_000_000) + b"]}"


def many_messages() -> bytes:
    one = b'{"role": "user", "content": ""}'
    return b'{"model": "pocket", "messages": [' + b",".join([one] * 1_000_000) + b"]}"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", lambda: completion("text, and more text. " * (2 * MB)), "prompt"),
        ("/v1/chat/completions", lambda: chat("text, and more text. " * (2 * MB)), "messages"),
        ("/v1/completions", many_ids, "prompt"),
        ("/v1/chat/completions", many_messages, "messages"),
        ("/v1/chat/completions", lambda: chat(*["a"] * 20_000), "messages"),
        ("/tokenize", lambda: json.dumps({"prompt": "a b " * (4 * MB)}), "prompt"),
        ("/detokenize", lambda: json.dumps({"tokens": [65] * (2 * LONGEST)}), "tokens"),
    ],
)
def test_what_cannot_fit_is_refused_at_once_and_nobody_waits_for_it(
    large: tuple[Endpoint, int], path: str, body: Callable[[], bytes], param: str
) -> None:
    endpoint, port = large
    made, taken = body(), 0.0

    def send() -> None:
        nonlocal taken
        started = time.monotonic()
        status, said = post(port, path, made)
        taken = time.monotonic() - started
        assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
        assert said["error"]["param"] == param

    check_nobody_waits(port, send)
    assert taken < 5
    assert not endpoint.backend.requests


@pytest.mark.parametrize("text", [", " * 150_000, '", ' * 90_000, '\\",' * 90_000, "\\," * 90_000])
def test_commas_of_a_text_are_no_values(tmp_path: Path, text: str) -> None:
    limits = replace(backend.LIMITS, max_model_len=10, max_output_tokens=5, max_choices=1)
    reader = Reader(limits, Endpoint(tmp_path).tokenizer)
    with pytest.raises(RestError) as refused:
        reader.completion(completion(text), "id", 0.0)
    assert "values" not in refused.value.message
    with pytest.raises(RestError, match=r"more than 16400 values"):
        reader.completion(completion([text, *[1] * 200_000]), "id", 0.0)


@given(
    text=st.text(st.sampled_from('a\\"\n\u00e9\u4e00/, '), max_size=60),
    key=st.sampled_from(["prompt", "content", "text", "input", "user"]),
    several=st.booleans(),
    ascii_only=st.booleans(),
)
def test_the_longest_text_of_a_body_has_as_many_bytes_at_least(
    text: str, key: str, several: bool, ascii_only: bool
) -> None:
    fields = {"n": 1, key: [text, "b"] if several else text, "stop": ["c"]}
    body = json.dumps(fields, ensure_ascii=ascii_only).encode()
    found = longest_text(body)
    assert found <= len(text.encode())
    assert all(longest_text(body[:size]) <= len(text.encode()) for size in range(len(body)))
    if key == "user":
        assert found == 0
    elif len(text) > len("content") and not set(text) & set('\\"\n\u00e9\u4e00'):
        assert found == len(text)


@pytest.mark.parametrize("kind", ["chat", "completion", "responses"])
def test_a_text_that_cannot_fit_is_refused_before_anything_is_parsed(
    tmp_path: Path, kind: Any
) -> None:
    limits = replace(backend.LIMITS, max_model_len=10, max_output_tokens=5)
    reader = Reader(limits, Endpoint(tmp_path).tokenizer)
    fits, too_long = (b'{"prompt" : ["%s"], ' % (b"a" * size) for size in (10, 11))
    reader.check_texts(kind, fits)
    with pytest.raises(RestError) as refused:
        reader.check_texts(kind, too_long)
    assert refused.value.code == "context_length_exceeded"
    with pytest.raises(RestError):
        reader.check_texts(kind, b'{"n": [%s], "prompt": "12345678901"}' % (b"1, " * MB))


def test_four_large_texts_are_each_refused(large: tuple[Endpoint, int]) -> None:
    _, port = large
    body = completion("words of a text. " * (40 * MB // 17))

    def send_four() -> None:
        with ThreadPoolExecutor(4) as clients:
            answers = [clients.submit(post, port, "/v1/completions", body) for _ in range(4)]
            assert [answer.result()[0] for answer in answers] == [400] * 4

    check_nobody_waits(port, send_four)


def test_a_long_prompt_is_read_elsewhere_and_comes_whole(large: tuple[Endpoint, int]) -> None:
    endpoint, port = large
    text = "".join(chr(97 + n % 26) for n in range(100_000))
    ids = [n % 256 for n in range(LONGEST - 1)]
    padded = {"model": MODEL, "prompt": text, "user": "u" * LARGE_BYTES}
    for body in (json.dumps(padded).encode(), completion(ids), completion([[65], [66] * 90_000])):
        assert len(body) > LARGE_BYTES
        assert post(port, "/v1/completions", body)[0] == 200
    first, second, third, fourth = (r.prompt.tolist() for r in endpoint.backend.requests)
    assert bytes(first).decode() == text
    assert second == ids
    assert (third, len(fourth)) == ([65], 90_000)
    endpoint.backend.requests.clear()


def test_the_limit_itself_is_served_and_one_token_more_is_not(large: tuple[Endpoint, int]) -> None:
    endpoint, port = large
    assert post(port, "/v1/completions", completion("a" * (LONGEST - 1)))[0] == 200
    status, said = post(port, "/v1/completions", completion("a" * (LONGEST + 1)))
    assert (status, said["error"]["code"]) == (400, "context_length_exceeded")
    assert str(LONGEST) in said["error"]["message"]
    endpoint.backend.requests.clear()


def test_a_stream_goes_on_while_large_bodies_are_read(large: tuple[Endpoint, int]) -> None:
    endpoint, port = large
    large_body = many_ids()
    endpoint.backend.prefill_seconds = 2.0
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    body = json.dumps({"model": MODEL, "prompt": "Well?", "stream": True})
    connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
    comments: list[float] = []
    answer = connection.getresponse()
    sending = threading.Thread(target=post, args=(port, "/v1/completions", large_body))
    sending.start()
    while line := answer.readline():
        if line.startswith(b": prefill"):
            comments.append(time.monotonic())
    sending.join()
    endpoint.backend.prefill_seconds = 0.0
    endpoint.backend.requests.clear()
    gaps = [after - before for before, after in itertools.pairwise(comments)]
    assert len(gaps) > 10
    assert max(gaps) < LIMITS.signs_of_life.silence + LATE_SECONDS


def test_the_other_process_may_die(large: tuple[Endpoint, int]) -> None:
    endpoint, port = large
    body = completion([65] * (LONGEST - 1))
    assert post(port, "/v1/completions", body)[0] == 200
    for process in reader_processes():
        os.kill(process, signal.SIGKILL)
    wait_for(lambda: post(port, "/v1/completions", body)[0] == 200)
    endpoint.backend.requests.clear()


def test_a_body_that_never_ends_is_given_up(large: tuple[Endpoint, int]) -> None:
    _, port = large
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    connection.putrequest("POST", "/v1/completions")
    connection.putheader("Content-Type", "application/json")
    connection.putheader("Content-Length", "100")
    connection.endheaders(b'{"model": ')
    started = time.monotonic()
    answer = connection.getresponse()
    assert (answer.status, json.loads(answer.read())["error"]["code"]) == (408, "body_too_slow")
    assert LIMITS.receive_seconds - 0.1 < time.monotonic() - started < LIMITS.receive_seconds + 2


def test_more_large_bodies_than_are_held_are_told_to_come_back(tmp_path: Path) -> None:
    limits = replace(backend.LIMITS, max_body_bytes=MB, receive_seconds=10.0)
    endpoint = Endpoint(tmp_path, limits=limits)
    with serving(endpoint.api) as port:
        slow = [http.client.HTTPConnection("127.0.0.1", port, timeout=10) for _ in range(4)]
        for connection in slow:
            connection.putrequest("POST", "/tokenize")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", str(MB))
            connection.endheaders(b" " * (MB - 1))
        body = json.dumps({"prompt": "a" * 1000})
        wait_for(lambda: post(port, "/tokenize", body)[0] == 429)
        for connection in slow:
            connection.close()
        wait_for(lambda: post(port, "/tokenize", json.dumps({"prompt": "a" * 20}))[0] == 200)
