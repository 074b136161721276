"""The page of all fields says what the endpoint does: every value on it is sent."""

import json
import re
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import openai.types.chat.completion_create_params as chat_params
import openai.types.completion_create_params as completion_params
import pytest

from longreach.cluster.rest import fields, schemas

from .backend import MODEL, Endpoint

PAGE = Path(__file__).parents[3] / "docs" / "endpoint.md"
ENDPOINTS = {"chat": ("chat",), "completions": ("completions",), "both": ("chat", "completions")}
IN_BACKTICKS = re.compile(r"`([^`]+)`")
USER = {"role": "user", "content": "Well?"}
NOT_SAID = {
    ("guided_json", '"{"'),
    ("guided_regex", '"(a"'),
    ("guided_grammar", '"root ::= ("'),
    ("structured_outputs", '{"regex": "a", "choice": ["a"]}'),
    ("tool_choice", '"required"'),
    ("tool_choice", '{"type": "function", "function": {"name": "f"}}'),
}
"""Refused for what cannot be said in a schema: what compiles, and what other fields have."""
# What a field is sent with, so that it is the one that is looked at.
BESIDE: dict[str, dict[str, Any]] = {
    "top_logprobs": {"logprobs": True},
}


@dataclass(frozen=True)
class Row:
    """One field of one endpoint, with values as JSON."""

    endpoint: str
    field: str
    accepted: list[str]
    refused: list[str]


def cells_of(header: str) -> Iterator[list[str]]:
    """Rows of the table that begins with this cell."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(number for number, line in enumerate(lines) if line.startswith(f"| {header} |"))
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            return
        yield [cell.strip() for cell in line.strip("| ").split(" | ")]


def values_of(cells: list[str], index: int) -> list[str]:
    return IN_BACKTICKS.findall(cells[index]) if len(cells) > index else []


def rows() -> list[Row]:
    return [
        Row(endpoint, cells[0].strip("`"), values_of(cells, 4), values_of(cells, 5))
        for cells in cells_of("field")
        for endpoint in ENDPOINTS[cells[1]]
    ]


def sent(accepted: bool) -> Iterator[Any]:
    for row in rows():
        for value in row.accepted if accepted else row.refused:
            name = f"{row.endpoint}-{row.field}-{value}"
            yield pytest.param(row.endpoint, row.field, json.loads(value), id=name)


def sent_in_messages(accepted: bool) -> Iterator[Any]:
    for cells in cells_of("field of a message"):
        field = cells[0].strip("`")
        for value in values_of(cells, 2 if accepted else 3):
            yield pytest.param(field, json.loads(value), id=f"{field}-{value}")


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Endpoint:
    """For tests of which each sends little."""
    return Endpoint(tmp_path_factory.mktemp("endpoint"))


def ask(endpoint: Endpoint, kind: str, field: str, value: object) -> httpx.Response:
    body = {**BESIDE.get(field, {}), field: value}
    return endpoint.chat(**body) if kind == "chat" else endpoint.complete(**body)


@pytest.mark.parametrize(("kind", "field", "value"), list(sent(accepted=True)))
def test_what_is_accepted(shared: Endpoint, kind: str, field: str, value: object) -> None:
    answer = ask(shared, kind, field, value)
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("kind", "field", "value"), list(sent(accepted=False)))
def test_what_is_refused_by_its_name(
    shared: Endpoint, kind: str, field: str, value: object
) -> None:
    shared.backend.requests.clear()
    answer = ask(shared, kind, field, value)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].partition(".")[0] == field
    assert not shared.backend.requests


@pytest.mark.parametrize(("field", "value"), list(sent_in_messages(accepted=True)))
def test_what_messages_may_hold(shared: Endpoint, field: str, value: object) -> None:
    answer = shared.chat(messages=[{**USER, field: value}])
    assert answer.status_code == 200, answer.text


@pytest.mark.parametrize(("field", "value"), list(sent_in_messages(accepted=False)))
def test_what_messages_may_not_hold(shared: Endpoint, field: str, value: object) -> None:
    answer = shared.chat(messages=[{**USER, field: value}])
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(f"messages.0.{field}")


@pytest.mark.parametrize(
    ("kind", "params", "body"),
    [
        ("chat", chat_params.CompletionCreateParamsStreaming, schemas.ChatBody),
        ("completions", completion_params.CompletionCreateParamsStreaming, schemas.CompletionBody),
    ],
)
def test_the_page_has_every_field(kind: str, params: type, body: type[schemas.ChatBody]) -> None:
    documented = {row.field for row in rows() if row.endpoint == kind}
    assert set(typing.get_type_hints(params)) <= documented
    # What is advice or unsupported for the one endpoint may not be heard of for the other.
    known = set(body.model_fields) | body.advice | set(body.unsupported)
    assert documented <= known
    everything = {row.field for row in rows()}
    assert known <= everything
    assert set(body.model_fields) <= documented


def test_the_page_has_every_field_of_messages() -> None:
    documented = {cells[0].strip("`") for cells in cells_of("field of a message")}
    known = {*schemas.Message.model_fields, *fields.ADVICE_MESSAGE, *fields.UNSUPPORTED_MESSAGE}
    assert documented == known


@pytest.mark.parametrize(
    ("sent", "named"),
    [
        ({"colour": 1, "functions": [{}], "audio": {}}, "colour"),
        ({"functions": [{}], "colour": 1, "audio": {}}, "functions"),
        ({"audio": {}, "user": "me", "functions": [{}]}, "audio"),
    ],
)
def test_of_several_that_are_refused_the_first_as_sent_is_named(
    endpoint: Endpoint, sent: dict[str, Any], named: str
) -> None:
    assert endpoint.chat(**sent).json()["error"]["param"] == named


@pytest.mark.parametrize("value", [True, 1.5, "1", [1]])
def test_what_looks_like_a_neutral_value_is_none(endpoint: Endpoint, value: object) -> None:
    answer = endpoint.complete(best_of=value)
    assert answer.json()["error"]["code"] == "unsupported_parameter"


def test_whole_numbers_arrive_whole(endpoint: Endpoint) -> None:
    endpoint.complete(max_tokens=16.0, top_k=3.0, seed=4.0, min_tokens=2.0)
    sampling = endpoint.backend.requests[0].sampling
    numbers = (sampling.max_tokens, sampling.top_k, sampling.seed, sampling.min_tokens)
    assert numbers == (16, 3, 4, 2)
    assert all(type(number) is int for number in numbers)


@pytest.mark.parametrize(
    ("sent", "ids"),
    [
        ([0, 258], [[0, 258]]),
        ([1.0, 2], [[1, 2]]),
        ([[1, 2.0], [3]], [[1, 2], [3]]),
        ([[65], "a"], [[65], [97]]),
    ],
)
def test_prompts_of_token_ids(endpoint: Endpoint, sent: object, ids: list[list[int]]) -> None:
    endpoint.complete(prompt=sent)
    prompts = [request.prompt for request in endpoint.backend.requests]
    assert [prompt.tolist() for prompt in prompts] == ids
    assert {prompt.dtype.name for prompt in prompts} == {"int32"}


def test_no_more_tokens_at_least_than_at_most(endpoint: Endpoint) -> None:
    assert endpoint.complete(max_tokens=3, min_tokens=4).json()["error"]["param"] == "min_tokens"
    assert endpoint.complete(max_tokens=3, min_tokens=3).status_code == 200


def test_empty_strings_stop_nothing(endpoint: Endpoint) -> None:
    endpoint.complete(stop=["", "end"])
    endpoint.complete(stop="")
    assert [r.sampling.stop for r in endpoint.backend.requests] == [("end",), ()]


@pytest.mark.parametrize(("asked", "named"), [("mine-1", True), ("not fit", False)])
def test_a_request_id_in_the_body_is_in_the_answers(
    endpoint: Endpoint, asked: str, named: bool
) -> None:
    answer = endpoint.chat(request_id=asked)
    assert (asked in answer.json()["id"]) == named
    assert (asked in endpoint.backend.requests[0].request_id) == named


def test_usage_in_every_chunk(endpoint: Endpoint) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    for ask in (endpoint.chat, endpoint.complete):
        answer = ask(stream=True, stream_options=options)
        lines = [line[6:] for line in answer.text.splitlines() if line.startswith("data: {")]
        usages = [json.loads(line)["usage"] for line in lines]
        assert [usage["completion_tokens"] for usage in usages] == [1, 2, 3, 4, 4]
        prompt = len(endpoint.backend.requests[-1].prompt)
        assert all(usage["total_tokens"] - usage["completion_tokens"] == prompt for usage in usages)


def test_the_last_message_is_continued(endpoint: Endpoint) -> None:
    chat = [USER, {"role": "assistant", "content": "It is "}]
    endpoint.chat(messages=chat)
    endpoint.chat(messages=chat, continue_final_message=True)
    endpoint.chat(messages=chat, add_generation_prompt=False)
    answered, continued, neither = (
        endpoint.tokenizer.decode(request.prompt) for request in endpoint.backend.requests
    )
    assert continued.endswith("It is ")
    assert neither.startswith(continued)
    assert answered.startswith(neither)
    assert len(answered) > len(neither) > len(continued)


def test_token_strs(endpoint: Endpoint) -> None:
    answer = endpoint.post("/tokenize", {"prompt": "a b", "return_token_strs": True}).json()
    assert answer["token_strs"] == ["a", "Ġ", "b"]
    assert endpoint.post("/tokenize", {"prompt": "a b"}).json()["token_strs"] is None


def test_the_description_says_the_same_as_the_page(shared: Endpoint) -> None:
    """But for what depends on several fields, or has a language of its own."""
    page = shared.request("GET", "/openapi.json").json()
    validators = {
        kind: jsonschema.Draft202012Validator(
            {"$ref": f"#/components/schemas/{body.__name__}", "components": page["components"]}
        )
        for kind, body in (("chat", schemas.ChatBody), ("completions", schemas.CompletionBody))
    }
    bases = {"chat": {"messages": [USER]}, "completions": {"prompt": "a"}}
    lies = {
        (row.field, value)
        for row in rows()
        for values, is_accepted in ((row.accepted, True), (row.refused, False))
        for value in values
        if validators[row.endpoint].is_valid(
            {**bases[row.endpoint], **BESIDE.get(row.field, {}), row.field: json.loads(value)}
        )
        != is_accepted
    }
    assert lies == {("chat_template_kwargs", '{"messages": []}'), *NOT_SAID}


def test_a_body_needs_no_model(endpoint: Endpoint) -> None:
    answer = endpoint.post("/v1/completions", {"prompt": "a"})
    assert answer.json()["model"] == MODEL
