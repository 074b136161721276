"""What a client that waits gets meanwhile, and what it is told about how long an answer may be."""

import json
import time
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from longreach.cluster.rest import SignsOfLife
from longreach.engine.errors import UnavailableError

from .backend import LIMITS, Endpoint

WAIT_SECONDS = 0.3


def waiting(folder: Path, signs: SignsOfLife) -> Endpoint:
    endpoint = Endpoint(folder, limits=replace(LIMITS, signs_of_life=signs))
    endpoint.backend.prefill_seconds = WAIT_SECONDS
    return endpoint


def events(answer: httpx.Response) -> list[dict]:
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line[:7] == "data: {"]


def text_of(events: list[dict]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(
        each["delta"]["content"] if "delta" in each else each["text"] for each in choices
    )


@pytest.fixture
def clamping(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path, limits=replace(LIMITS, clamp_max_tokens=True))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("prompt", "asked", "allowed"),
    [(10, 51, 50), (10, 10**9, 50), (80, 50, 20), (99, 5, 1), (10, 50, None), (80, 20, None)],
)
def test_who_asks_for_too_many_tokens_gets_as_many_as_may_be_and_is_told(
    clamping: Endpoint, prompt: int, asked: int, allowed: int | None, stream: bool
) -> None:
    answer = clamping.complete(prompt=[65] * prompt, max_tokens=asked, stream=stream)
    assert answer.status_code == 200
    assert answer.headers.get("x-longreach-max-tokens") == (str(allowed) if allowed else None)
    assert clamping.backend.requests[0].sampling.max_tokens == (allowed or asked)


def test_of_several_prompts_the_shortest_answer_is_told(clamping: Endpoint) -> None:
    answer = clamping.complete(prompt=[[65] * 10, [65] * 70], max_tokens=40)
    assert answer.headers["x-longreach-max-tokens"] == "30"
    assert [r.sampling.max_tokens for r in clamping.backend.requests] == [40, 30]


def test_a_prompt_without_room_for_an_answer_is_refused(clamping: Endpoint) -> None:
    error = clamping.complete(prompt=[65] * 100, max_tokens=5).json()["error"]
    assert error["code"] == "context_length_exceeded"


def test_models_say_how_long_answers_may_be(endpoint: Endpoint) -> None:
    [model] = endpoint.request("GET", "/v1/models").json()["data"]
    assert (model["max_model_len"], model["max_output_tokens"]) == (100, 50)


@pytest.mark.parametrize("kind", ["chat", "complete"])
def test_progress_in_events_for_who_asks(tmp_path: Path, kind: str) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(0.05))
    answer = getattr(endpoint, kind)(stream=True, return_progress=True)
    said = events(answer)
    progress = [each["prompt_progress"] for each in said if "prompt_progress" in each]
    prompt = len(endpoint.backend.requests[0].prompt)
    assert len(progress) >= 2
    assert {each["total"] for each in progress} == {prompt}
    assert {each["processed"] for each in progress} == {prompt // 2}
    assert {each["cache"] for each in progress} == {0}
    times = [each["time_ms"] for each in progress]
    assert times == sorted(times)
    assert times[-1] <= 1000 * 30
    assert ": prefill" not in answer.text
    assert text_of(said) == "Yes."
    assert "prompt_progress" not in said[-1]


def test_progress_in_comments_for_all_others(tmp_path: Path) -> None:
    answer = waiting(tmp_path, SignsOfLife(0.05)).chat(stream=True)
    assert "prompt_progress" not in answer.text
    assert answer.text.startswith(": prefill")


def test_events_that_say_nothing_for_gateways_that_swallow_comments(tmp_path: Path) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(0.02, empty_delta_seconds=0.1))
    started = time.monotonic()
    answer = endpoint.chat(stream=True, n=2)
    taken = time.monotonic() - started
    said = events(answer)
    empty = [each for each in said if each["choices"][0]["delta"].get("content") == ""]
    assert 1 <= len(empty) <= taken / 0.1
    assert said[0]["choices"][0]["delta"] == {"content": "", "role": "assistant"}
    assert sum("role" in choice["delta"] for each in said for choice in each["choices"]) == 2
    assert all(choice["finish_reason"] is None for each in empty for choice in each["choices"])
    assert ": prefill" in answer.text
    assert text_of(said) == "Yes." * 2


def test_events_come_as_often_as_wished_where_comments_are_rarer(tmp_path: Path) -> None:
    answer = waiting(tmp_path, SignsOfLife(2.0, empty_delta_seconds=0.05)).complete(stream=True)
    assert sum(each["choices"][0]["text"] == "" for each in events(answer)) >= 2


def test_an_empty_event_is_of_a_choice_that_goes_on(tmp_path: Path) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(0.02, empty_delta_seconds=0.05))
    endpoint.backend.prefill_seconds = 0
    endpoint.backend.step_seconds, endpoint.backend.at_once = 0.2, 100
    ended: set[int] = set()
    for event in events(endpoint.complete(stream=True, n=2)):
        [choice] = event["choices"]
        assert choice["index"] not in ended
        ended |= {choice["index"]} if choice["finish_reason"] else set()
    assert ended == {0, 1}


def test_white_space_keeps_a_connection_alive_before_json(tmp_path: Path) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(1.0, white_space_seconds=0.05))
    started = time.monotonic()
    answer = endpoint.chat()
    taken = time.monotonic() - started
    spaces = len(answer.text) - len(answer.text.lstrip(" "))
    assert 1 <= spaces <= taken / 0.05 + 1
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["choices"][0]["message"]["content"] == "Yes."


def test_without_the_setting_there_is_no_white_space(tmp_path: Path) -> None:
    assert waiting(tmp_path, SignsOfLife(0.05)).chat().text.startswith("{")


def test_an_error_after_white_space_is_told_by_the_body(tmp_path: Path) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(1.0, white_space_seconds=0.05))
    endpoint.backend.error, endpoint.backend.error_after = UnavailableError("gone"), 0
    answer = endpoint.chat()
    assert answer.status_code == 200
    assert answer.text.startswith(" ")
    assert answer.json()["error"]["code"] == "unavailable"
    counted = [
        line
        for line in endpoint.request("GET", "/metrics").text.splitlines()
        if line.startswith("longreach_requests_total{")
    ]
    assert len(counted) == 1
    assert 'outcome="failed"' in counted[0]


def test_what_is_refused_at_once_keeps_its_status(tmp_path: Path) -> None:
    endpoint = waiting(tmp_path, SignsOfLife(1.0, white_space_seconds=0.05))
    endpoint.backend.error = UnavailableError("gone")
    assert endpoint.chat().status_code == 503
