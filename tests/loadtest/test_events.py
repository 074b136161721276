"""Lines of an event stream."""

import json

import pytest

from longreach.loadtest.events import (
    ErrorEventError,
    Event,
    LineSplitter,
    MalformedError,
    Usage,
    read_event,
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
def test_lines_end_with_line_feeds_alone(size: int) -> None:
    """U+2028 and U+0085 end lines for Python's splitlines, and for httpx."""
    stream = "data: a\u2028b\u0085c\r\n\n: d\x0be\nrest".encode()
    splitter = LineSplitter()
    parts = [stream[at : at + size] for at in range(0, len(stream), size)]
    lines = [line for part in parts for line in splitter.lines(part)]
    assert lines == ["data: a\u2028b\u0085c", "", ": d\x0be"]


def data(**fields: object) -> str:
    return f"data: {json.dumps(fields)}"


@pytest.mark.parametrize("line", ["", ": prefill 10% 1/10", "event: message", "id: 7", ":"])
def test_lines_without_data_are_no_events(line: str) -> None:
    assert read_event(line) is None


@pytest.mark.parametrize(
    "line",
    [
        data(choices=[]),
        data(choices=[], prompt_progress={"total": 10}),
        data(choices=[{"delta": {"role": "assistant", "content": ""}}]),
        data(choices=[{"delta": {"content": None}, "finish_reason": "stop"}]),
        data(choices=[{"finish_reason": "stop"}]),
        data(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3}),
    ],
)
def test_events_without_text_are_no_token(line: str) -> None:
    event = read_event(line)
    assert event is not None
    assert not event.has_token
    assert not event.is_end


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_thoughts_are_tokens_but_no_answer(field: str) -> None:
    event = read_event(data(choices=[{"delta": {field: "let me see"}}]))
    assert event is not None
    assert event == Event(thought="let me see")
    assert event.has_token


def test_text_usage_and_the_end_are_read() -> None:
    assert read_event(data(choices=[{"delta": {"content": " 47"}}])) == Event(text=" 47")
    counted = data(choices=[], usage={"prompt_tokens": 7, "completion_tokens": 3})
    assert read_event(counted) == Event(usage=Usage(7, 3))
    assert read_event("data:[DONE]") == read_event("data: [DONE]") == Event(is_end=True)


@pytest.mark.parametrize("error", [{"message": "a rank died"}, "a rank died"])
def test_an_error_is_raised_with_what_it_says(error: object) -> None:
    with pytest.raises(ErrorEventError, match=r"^a rank died$"):
        read_event(data(error=error))


@pytest.mark.parametrize("line", ["data: {", "data: 7", "data: null", 'data: {"choices": [7]}'])
def test_what_is_not_the_protocol_is_malformed(line: str) -> None:
    with pytest.raises(MalformedError):
        read_event(line)
