"""Answers held to a form, by the bundled model in this process."""

import json
import re
from typing import Any

import httpx
import jsonschema
import pytest

from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer

from .engine_backend import EngineEndpoint

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}
SCHEMAS: dict[str, dict[str, Any]] = {
    "person": PERSON,
    "enum": {"enum": ["red", 7, None, {"a": [True]}]},
    "const": {"const": {"kind": "x\u2028<|im_end|>\U0001f600"}},
    "array": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [{"type": "null"}, {"const": 1.5}],
              "items": False, "minItems": 2},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "uuid": {"type": "string", "format": "uuid"},
    "multiple": {"type": "integer", "multipleOf": 7, "minimum": 0, "maximum": 700},
    "nullable": {"type": ["string", "null"], "maxLength": 3},
    "any of": {"anyOf": [{"type": "boolean"}, {"type": "integer", "minimum": 0, "maximum": 9}]},
    "all of": {"allOf": [{"type": "integer", "minimum": 3}, {"type": "integer", "maximum": 5}]},
    "discriminated": {"oneOf": [
        {"type": "object", "properties": {"k": {"const": "a"}, "x": {"type": "boolean"}},
         "required": ["k", "x"], "additionalProperties": False},
        {"type": "object", "properties": {"k": {"const": "b"}, "y": {"type": "null"}},
         "required": ["k", "y"], "additionalProperties": False}]},
    "references": {"$defs": {"p": PERSON}, "type": "array", "items": {"$ref": "#/$defs/p"},
                   "minItems": 1, "maxItems": 2},
    "recursive": {"$defs": {"n": {"type": "object", "properties": {
        "v": {"type": "boolean"},
        "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/n"}]}},
        "required": ["v", "next"], "additionalProperties": False}}, "$ref": "#/$defs/n"},
}  # fmt: skip


@pytest.fixture(scope="module")
def endpoint() -> EngineEndpoint:
    return EngineEndpoint()


def strict(schema: object) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "it", "strict": True, "schema": schema}}


def texts(answer: httpx.Response) -> list[str]:
    assert answer.status_code == 200, answer.text
    choices = answer.json()["choices"]
    assert {choice["finish_reason"] for choice in choices} == {"stop"}
    return [choice["message"]["content"] for choice in choices]


@pytest.mark.parametrize("name", SCHEMAS)
def test_the_bundled_model_answers_in_valid_json(endpoint: EngineEndpoint, name: str) -> None:
    schema = SCHEMAS[name]
    # What goes on for as long as it may ends with null, sooner or later.
    ending = {"logit_bias": {str(ord("n")): 20}}
    for asked in ({"temperature": 0}, {"temperature": 1.3, "seed": 2, "n": 2}):
        for text in texts(endpoint.chat(response_format=strict(schema), **ending, **asked)):
            jsonschema.validate(json.loads(text), schema)


def test_json_object(endpoint: EngineEndpoint) -> None:
    # Its strings end soon where the quotation mark is likely.
    biased = {"logit_bias": {str(ord('"')): 8, str(ord("}")): 8}, "seed": 1}
    [text] = texts(endpoint.chat(response_format={"type": "json_object"}, **biased))
    assert isinstance(json.loads(text), dict)


def test_a_form_of_text_is_none(endpoint: EngineEndpoint) -> None:
    plain, asked = (
        endpoint.chat(temperature=0, max_tokens=8, **fields).json()["choices"]
        for fields in ({}, {"response_format": {"type": "text"}})
    )
    assert plain == asked


@pytest.mark.parametrize(
    ("fields", "pattern"),
    [
        ({"structured_outputs": {"choice": ["yes", 'no "way"', "perhaps/"]}},
         r'yes|no "way"|perhaps/'),
        ({"guided_choice": ["left", "right"]}, "left|right"),
        ({"structured_outputs": {"regex": "[a-c]{3}/\\d{2}"}}, r"[a-c]{3}/\d{2}"),
        ({"guided_regex": "^(x|y)\n[0-3]$"}, "(x|y)\n[0-3]"),
        ({"structured_outputs": {"grammar": 'root ::= "a" [0-9] "b"'}}, "a[0-9]b"),
        ({"guided_grammar": 'start: "q" /[0-9]{2}/'}, "q[0-9]{2}"),
        ({"structured_outputs": {"json": PERSON, "disable_any_whitespace": True}},
         r'\{"name":".{0,12}","age":[0-9]+\}'),
        ({"guided_json": json.dumps(PERSON)}, r'\{"name": ?".{0,12}", ?"age": ?[0-9]+\}'),
        ({"guided_json": PERSON, "guided_whitespace_pattern": "\n"},
         r'\{\n?"name"\n?:\n?".{0,12}"\n?,\n?"age"\n?:\n?[0-9]+\n?\}'),
    ],
)  # fmt: skip
def test_vllms_fields(endpoint: EngineEndpoint, fields: dict[str, Any], pattern: str) -> None:
    for text in texts(endpoint.chat(temperature=1.2, seed=4, n=2, **fields)):
        assert re.fullmatch(pattern, text, re.DOTALL)
    completion = endpoint.complete(temperature=0, **fields).json()
    assert re.fullmatch(pattern, completion["choices"][0]["text"], re.DOTALL)


def test_a_stream_says_the_same_with_log_probabilities(endpoint: EngineEndpoint) -> None:
    asked = {"response_format": strict(PERSON), "temperature": 1, "seed": 9, "logprobs": True}
    [whole] = texts(endpoint.chat(**asked))
    stream = endpoint.chat(**asked, stream=True).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    choices = [choice for event in events for choice in event["choices"]]
    assert "".join(choice["delta"].get("content") or "" for choice in choices) == whole
    tokens = [token for choice in choices for token in choice["logprobs"]["content"]]
    assert "".join(token["token"] for token in tokens) == whole
    assert all(token["logprob"] <= 0 for token in tokens)


def test_stop_strings_and_limits_cut_it(endpoint: EngineEndpoint) -> None:
    held = {"guided_regex": "abcdefgh", "temperature": 0}
    [stopped] = endpoint.chat(**held, stop="de").json()["choices"]
    assert (stopped["message"]["content"], stopped["finish_reason"]) == ("abc", "stop")
    [cut] = endpoint.chat(**held, max_tokens=3).json()["choices"]
    assert (cut["message"]["content"], cut["finish_reason"]) == ("abc", "length")


def test_without_strict_what_cannot_be_held_to_is_left_out(endpoint: EngineEndpoint) -> None:
    schema = {"type": "array", "items": {"type": "boolean"}, "maxItems": 2, "uniqueItems": True}
    loose = {"type": "json_schema", "json_schema": {"name": "it", "schema": schema}}
    [text] = texts(endpoint.chat(response_format=loose, temperature=0))
    assert isinstance(json.loads(text), list)
    refused = endpoint.chat(response_format=strict(schema))
    assert refused.status_code == 400
    assert "uniqueItems" in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"response_format": {"type": "structural_tag"}}, "response_format.type"),
        ({"response_format": strict({"type": "strig"})}, "response_format"),
        ({"response_format": strict(False)}, "response_format"),
        ({"response_format": strict({"$ref": "#"})}, "response_format"),
        ({"response_format": strict({"$ref": "http://elsewhere/schema"})}, "response_format"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "7"}, "guided_json"),
        ({"guided_json": "[" * 5000}, "guided_json"),
        ({"guided_regex": "(a"}, "guided_regex"),
        ({"guided_regex": "x" * 140_000}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_grammar": "root ::= ("}, "guided_grammar"),
        ({"guided_grammar": "start: ("}, "guided_grammar"),
        ({"guided_grammar": "root ::= " + "(" * 30_000}, "guided_grammar"),
        ({"structured_outputs": {"regex": "a", "choice": ["b"]}}, "structured_outputs.choice"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
    ],
)
def test_what_cannot_be_held_to_is_refused(
    endpoint: EngineEndpoint, fields: dict[str, Any], param: str
) -> None:
    for answer in (endpoint.chat(**fields), endpoint.complete(**fields)):
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param


def test_control_tokens_stay_text(endpoint: EngineEndpoint) -> None:
    answer = endpoint.chat(guided_choice=["<|im_end|>"], temperature=0)
    assert texts(answer) == ["<|im_end|>"]
    assert answer.json()["usage"]["completion_tokens"] == len("<|im_end|>")
    assert Tokenizer(CHECKPOINT).encode("<|im_end|>").tolist() == list(b"<|im_end|>")
