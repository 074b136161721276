"""`/v1/responses`, read with OpenAI's own types and clients."""

import json
import typing
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
from openai.types.responses import (
    Response,
    ResponseFunctionToolCall,
    ResponseOutputMessage,
    ResponseStreamEvent,
    response_create_params,
)
from pydantic import TypeAdapter

from longreach.cluster.rest import SignsOfLife
from longreach.cluster.rest.responses import ResponsesBody
from longreach.engine.errors import UnavailableError

from .backend import LIMITS, MODEL, Endpoint
from .server import serving

EVENT = TypeAdapter(ResponseStreamEvent)


def ask(endpoint: Endpoint, **fields: Any) -> Any:
    return endpoint.post("/v1/responses", {"model": MODEL, "input": "Well?", **fields})


def events_of(text: str) -> Iterator[Any]:
    """Each has its type in the line before its data."""
    for block in text.split("\n\n"):
        if block.startswith("event: "):
            name, data = block.split("\n")
            event = EVENT.validate_json(data.removeprefix("data: "))
            assert event.type == name.removeprefix("event: ")
            yield event


def test_a_response_is_in_openais_shape(endpoint: Endpoint) -> None:
    answer = ask(endpoint, instructions="Be short.", temperature=0.5, metadata={"a": "b"})
    response = Response.model_validate(answer.json())
    assert (response.status, response.output_text) == ("completed", "Yes.")
    assert response.id.startswith("resp_")
    assert response.usage is not None
    assert response.usage.output_tokens == 4
    assert response.usage.input_tokens == len(endpoint.backend.requests[0].prompt)
    assert (response.instructions, response.temperature) == ("Be short.", 0.5)
    assert response.metadata == {"a": "b"}
    assert endpoint.backend.requests[0].sampling.temperature == 0.5


def test_what_is_said_is_the_chat_that_it_stands_for(endpoint: Endpoint) -> None:
    endpoint.chat(
        messages=[
            {"role": "system", "content": "Be short."},
            {"role": "user", "content": "One\ntwo"},
            {"role": "assistant", "content": "Yes."},
            {"role": "user", "content": "Well?"},
        ]
    )
    before = ask(endpoint).json()["output"]
    parts = [{"type": "input_text", "text": "One"}, {"type": "input_text", "text": "two"}]
    said = [{"role": "user", "content": parts}, *before, {"role": "user", "content": "Well?"}]
    ask(endpoint, instructions="Be short.", input=said)
    chat, _, response = (request.prompt.tolist() for request in endpoint.backend.requests)
    assert chat == response


@pytest.mark.parametrize("max_output_tokens", [None, 3])
def test_events_build_up_what_comes_whole(
    endpoint: Endpoint, max_output_tokens: int | None
) -> None:
    events = list(events_of(ask(endpoint, stream=True, max_output_tokens=max_output_tokens).text))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    types = [event.type.removeprefix("response.") for event in events]
    assert types[:4] == ["created", "in_progress", "output_item.added", "content_part.added"]
    assert types[4:8] == ["output_text.delta"] * 4
    assert types[8:] == ["output_text.done", "content_part.done", "output_item.done", "completed"]
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    last = events[-1].response
    assert "".join(deltas) == events[8].text == last.output_text == "Yes."
    assert events[10].item == last.output[0]
    assert len({last.output[0].id, *(e.item_id for e in events[4:10])}) == 1
    whole = Response.model_validate(ask(endpoint).json())
    volatile = {"id", "created_at", "output", "max_output_tokens"}
    assert last.model_dump(exclude=volatile) == whole.model_dump(exclude=volatile)


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_that_is_cut_off_is_incomplete(endpoint: Endpoint, stream: bool) -> None:
    endpoint.backend.finish_reason = "length"
    answer = ask(endpoint, stream=stream)
    if stream:
        *_, done, last = events_of(answer.text)
        assert (last.type, done.item.status) == ("response.incomplete", "incomplete")
        said = last.response.model_dump()
    else:
        said = answer.json()
    assert said["status"] == said["output"][0]["status"] == "incomplete"
    assert said["incomplete_details"]["reason"] == "max_output_tokens"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_where_they_are_included(endpoint: Endpoint, stream: bool) -> None:
    fields = {"include": ["message.output_text.logprobs"], "top_logprobs": 2, "stream": stream}
    answer = ask(endpoint, **fields)
    response = (
        [*events_of(answer.text)][-1].response if stream else Response.model_validate(answer.json())
    )
    [message] = response.output
    assert isinstance(message, ResponseOutputMessage)
    logprobs = message.content[0].logprobs  # type: ignore[union-attr]
    assert [each.token for each in logprobs or []] == list("Yes.")
    assert all(len(each.top_logprobs) == 2 for each in logprobs or [])
    ask(endpoint, top_logprobs=2)
    assert endpoint.backend.requests[-1].sampling.top_logprobs is None


def test_a_stream_that_fails_says_so_in_its_last_event(endpoint: Endpoint) -> None:
    endpoint.backend.prefill_seconds = 0.1
    endpoint.backend.error, endpoint.backend.error_after = UnavailableError("gone"), 0
    *_, last = events_of(ask(endpoint, stream=True).text)
    assert last.type == "response.failed"
    assert (last.response.status, last.response.error.code) == ("failed", "server_error")


def test_what_is_refused_at_once_is_a_status(endpoint: Endpoint) -> None:
    endpoint.backend.error = UnavailableError("gone")
    assert ask(endpoint, stream=True).status_code == 503


def test_signs_of_life(tmp_path: Path) -> None:
    signs = SignsOfLife(0.02, empty_delta_seconds=0.05)
    endpoint = Endpoint(tmp_path, limits=replace(LIMITS, signs_of_life=signs))
    endpoint.backend.prefill_seconds = 0.3
    text = ask(endpoint, stream=True).text
    events = [event.type for event in events_of(text)]
    assert events.count("response.in_progress") >= 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"store": True}, "store"),
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"text": {"format": {"type": "grammar"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema"}}}, "text.format"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"),
        ({"include": ["web_search_call.results"]}, "include"),
        ({"input": []}, "input"),
        ({"input": [{"role": "tool", "content": "a"}]}, "input.0.role"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
         "input.0.content.0.type"),
        ({"input": [{"type": "reasoning", "summary": []}]}, "input.0.summary"),
        ({"input": "a" * 101}, "input"),
        ({"input": ""}, None),
        ({"max_output_tokens": 51}, "max_output_tokens"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"max_tokens": 5}, "max_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"top_logprobs": LIMITS.max_logprobs + 1}, "top_logprobs"),
        ({"colour": "red"}, "colour"),
    ],
)  # fmt: skip
def test_what_is_refused_is_named(endpoint: Endpoint, fields: dict, param: str | None) -> None:
    answer = ask(endpoint, **fields)
    if param is None:
        assert answer.status_code == 200
        return
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == param
    assert not endpoint.backend.requests


def test_what_changes_nothing_is_accepted(endpoint: Endpoint) -> None:
    advice = {
        "store": False, "reasoning": {"effort": "low"}, "text": {"verbosity": "low"}, "user": "me",
        "include": ["reasoning.encrypted_content"], "stream_options": {}, "truncation": "disabled",
        "parallel_tool_calls": False, "max_tool_calls": 3, "service_tier": "auto",
        "max_output_tokens": 5.0, "tools": [], "tool_choice": "auto", "previous_response_id": None,
    }  # fmt: skip
    assert ask(endpoint, **advice).status_code == 200


@pytest.fixture
def roomy(tmp_path: Path) -> Endpoint:
    """With room for what a template says about tools."""
    return Endpoint(tmp_path, limits=replace(LIMITS, max_model_len=4000))


CALL = '<tool_call>\n{"name": "look", "arguments": {"at": "sea"}}\n</tool_call>'
TOOL = {
    "type": "function",
    "name": "look",
    "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    "strict": None,
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("before", ["", "Let me see."])
def test_calls_of_tools_are_items(roomy: Endpoint, before: str, stream: bool) -> None:
    roomy.backend.text = before + CALL
    answer = ask(roomy, tools=[TOOL], stream=stream)
    if stream:
        events = list(events_of(answer.text))
        response = events[-1].response
        done = [e for e in events if e.type == "response.function_call_arguments.done"]
        deltas = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
        assert "".join(deltas) == done[0].arguments
        items = [e.item for e in events if e.type == "response.output_item.done"]
        assert items == response.output
        added = [e.output_index for e in events if e.type == "response.output_item.added"]
        assert added == list(range(len(items)))
    else:
        response = Response.model_validate(answer.json())
    *texts, call = response.output
    assert isinstance(call, ResponseFunctionToolCall)
    assert (call.name, json.loads(call.arguments)) == ("look", {"at": "sea"})
    assert call.call_id
    assert response.output_text.strip() == before
    assert len(texts) == bool(before)
    assert [tool.type for tool in response.tools] == ["function"]


def test_what_came_of_a_call_goes_into_the_next_request(roomy: Endpoint) -> None:
    roomy.backend.text = CALL
    made = ask(roomy, tools=[TOOL]).json()["output"]
    outcome = {"type": "function_call_output", "call_id": made[0]["call_id"], "output": "A whale."}
    asked = {"role": "user", "content": "Well?"}
    assert ask(roomy, tools=[TOOL], input=[asked, *made, outcome]).status_code == 200
    prompt = roomy.tokenizer.decode(roomy.backend.requests[-1].prompt)
    assert prompt.index("Well?") < prompt.index('"at": "sea"') < prompt.index("A whale.")


def test_the_form_of_the_text_is_the_chats(endpoint: Endpoint) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    form = {"type": "json_schema", "name": "a", "schema": schema, "strict": True}
    answer = ask(endpoint, text={"format": form})
    assert Response.model_validate(answer.json()).text is not None
    endpoint.chat(
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "a", "schema": schema, "strict": True},
        }
    )
    response, chat = endpoint.backend.requests
    assert response.sampling.grammar == chat.sampling.grammar is not None


def test_every_field_of_openais_is_known() -> None:
    params = response_create_params.ResponseCreateParamsStreaming
    known = {
        *ResponsesBody.model_fields, *ResponsesBody.advice, *ResponsesBody.unsupported
    }  # fmt: skip
    assert set(typing.get_type_hints(params)) == known


def test_openais_client(endpoint: Endpoint) -> None:
    with (
        serving(endpoint.api) as port,
        openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client,
    ):
        assert client.responses.create(model=MODEL, input="Well?").output_text == "Yes."
        with client.responses.stream(model=MODEL, input="Well?") as stream:
            text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
            final = stream.get_final_response()
        assert text == final.output_text == "Yes."
