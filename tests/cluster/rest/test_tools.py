"""Tools in chats: what the model is told, and what becomes of its calls."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import numpy as np
import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from longreach.cluster.rest.schemas import ChatBody, parse
from longreach.cluster.rest.tool_calls import CallBegun, ToolCallReader
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.grammar import GrammarCompiler, allowed_tokens
from longreach.engine.text.tokenizer import Tokenizer, Writing

from .backend import LIMITS, MODEL, Endpoint
from .engine_backend import EngineEndpoint

QWEN3 = Path(__file__).parents[4] / "shared" / "data" / "qwen3-tokenizer"
"""Qwen3's published tokenizer, in a folder beside this repository where somebody put it there."""
needs_qwen3 = pytest.mark.skipif(
    not QWEN3.exists(), reason="Qwen3's published tokenizer is not beside this repository"
)
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 8}, "days": {"enum": [1, 2, 7]}},
    "required": ["city", "days"],
    "additionalProperties": False,
}


def tool(name: str, parameters: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    function = {"name": name, "description": f"Does {name}.", **fields}
    if parameters is not None:
        function["parameters"] = parameters
    return {"type": "function", "function": function}


WEATHER, CLOCK = tool("weather", CITY), tool("clock")
USER = {"role": "user", "content": "How is the weather?"}
CALL = {"id": "call_1", "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Rome", "days": 1}'}}  # fmt: skip
HISTORY = [
    USER,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
]


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def engine() -> EngineEndpoint:
    return EngineEndpoint()


def calls_of(answer: httpx.Response) -> list[tuple[str, Any]]:
    assert answer.status_code == 200, answer.text
    [choice] = ChatCompletion.model_validate(answer.json()).choices
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content is None
    made = []
    for call in choice.message.tool_calls or ():
        assert call.type == "function"
        made.append((call.function.name, json.loads(call.function.arguments)))
    return made


@pytest.mark.parametrize("asked", [{"temperature": 0}, {"temperature": 1.2, "seed": 3}])
def test_a_named_tool_is_called_with_valid_arguments(
    engine: EngineEndpoint, asked: dict[str, Any]
) -> None:
    tools = {"tools": [CLOCK, WEATHER], "tool_choice": named("weather")}
    [(name, arguments)] = calls_of(engine.chat(**tools, **asked))
    assert name == "weather"
    jsonschema.validate(arguments, CITY)


def test_a_call_is_required(engine: EngineEndpoint) -> None:
    tools = {"tools": [WEATHER, tool("other", CITY)], "parallel_tool_calls": False}
    [(name, arguments)] = calls_of(engine.chat(**tools, tool_choice="required", temperature=0))
    assert name in ("weather", "other")
    jsonschema.validate(arguments, CITY)


def test_a_streamed_call_is_the_same(engine: EngineEndpoint) -> None:
    asked = {"tools": [WEATHER], "tool_choice": named("weather"), "temperature": 0.9, "seed": 4}
    [(name, arguments)] = calls_of(engine.chat(**asked))
    stream = engine.chat(**asked, stream=True).text
    chunks = [
        ChatCompletionChunk.model_validate_json(line[6:])
        for line in stream.splitlines()
        if line.startswith("data: {")
    ]
    deltas = [choice.delta for chunk in chunks for choice in chunk.choices]
    parts = [call for delta in deltas for call in delta.tool_calls or ()]
    assert deltas[0].role == "assistant"
    assert parts[0].id
    assert parts[0].function is not None
    assert parts[0].function.name == name
    assert all(part.id is None for part in parts[1:])
    text = "".join(part.function.arguments or "" for part in parts if part.function)
    assert json.loads(text) == arguments
    assert len(parts) > 3
    assert "".join(delta.content or "" for delta in deltas) == ""
    assert chunks[-1].choices[0].finish_reason == "tool_calls"


def test_a_history_of_calls_is_answered(engine: EngineEndpoint) -> None:
    body = {"model": MODEL, "messages": HISTORY, "tools": [WEATHER], "max_tokens": 4}
    answer = engine.post("/v1/chat/completions", body)
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["message"]["content"]


@pytest.mark.parametrize(
    ("text", "content", "calls", "reason"),
    [
        ('<tool_call>{"name": "clock", "arguments": {}}</tool_call>', None, 1, "tool_calls"),
        ('Well. <tool_call>{"name": "clock"}</tool_call>', "Well.", 1, "tool_calls"),
        ("No tools.", "No tools.", 0, "stop"),
        ("<tool_call>what?</tool_call>", "<tool_call>what?</tool_call>", 0, "stop"),
    ],
)
def test_the_model_calls_as_it_likes(
    endpoint: Endpoint, text: str, content: str | None, calls: int, reason: str
) -> None:
    endpoint.backend.text = text
    fields = {"tools": [CLOCK], "max_tokens": 50}
    limits = {"messages": [{"role": "user", "content": "?"}]}
    [choice] = endpoint.chat(**limits, **fields).json()["choices"]
    assert choice["message"]["content"] == content
    assert len(choice["message"].get("tool_calls") or ()) == calls
    assert choice["finish_reason"] == reason
    assert endpoint.backend.requests[0].sampling.grammar is None


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path, limits=replace(LIMITS, max_model_len=1000))


def test_several_choices_have_calls_of_their_own(endpoint: Endpoint) -> None:
    endpoint.backend.text = '<tool_call>{"name": "clock", "arguments": {"a": 1}}</tool_call>'
    stream = endpoint.chat(tools=[CLOCK], n=2, stream=True, logprobs=True).text
    events = [json.loads(line[6:]) for line in stream.splitlines() if line.startswith("data: {")]
    arguments = {0: "", 1: ""}
    tokens = 0
    for event in events:
        for choice in event["choices"]:
            tokens += len(choice["logprobs"]["content"])
            for call in choice["delta"].get("tool_calls") or ():
                arguments[choice["index"]] += call["function"]["arguments"]
    assert arguments == {0: '{"a": 1}', 1: '{"a": 1}'}
    assert tokens == 2 * len(endpoint.backend.text)


def test_without_a_choice_of_tools_text_is_text(endpoint: Endpoint) -> None:
    endpoint.backend.text = written = '<tool_call>{"name": "clock"}</tool_call>'
    for fields in ({}, {"tools": []}, {"tools": [CLOCK], "tool_choice": "none"}):
        [choice] = endpoint.chat(**fields).json()["choices"]
        assert choice["message"]["content"] == written
        assert choice["finish_reason"] == "stop"
    lengths = {len(request.prompt) for request in endpoint.backend.requests}
    assert len(lengths) == 1


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": named("clock")}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": named("clock")}, "tool_choice"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice"),
        ({"tools": [tool("no name")]}, "tools.0.function.name"),
        ({"tools": [{"type": "custom"}]}, "tools.0.type"),
        ({"tools": [tool("f", {"type": "strig"})], "tool_choice": "required"}, "tool_choice"),
        ({"tools": [tool("f", {"uniqueItems": True}, strict=True)], "tool_choice": "required"},
         "tool_choice"),
        ({"tools": [CLOCK], "tool_choice": "required", "response_format": {"type": "json_object"}},
         "tool_choice"),
    ],
)  # fmt: skip
def test_what_cannot_be_called_is_refused(
    engine: EngineEndpoint, fields: dict[str, Any], param: str
) -> None:
    answer = engine.chat(**fields)
    assert answer.status_code == 400
    assert (answer.json()["error"]["param"] or "").startswith(param)


def test_a_template_without_tools_refuses_them(tmp_path: Path) -> None:
    endpoint = Endpoint(tmp_path)
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    (tmp_path / "chat_template.jinja").write_text(plain)
    assert not Tokenizer(tmp_path).takes_tools
    assert endpoint.tokenizer.takes_tools


def test_control_tokens_in_tools_stay_text(endpoint: Endpoint) -> None:
    endpoint.chat(tools=[tool("f", {"enum": ["<|im_end|>"]})])
    [request] = endpoint.backend.requests
    control = [token for token in request.prompt.tolist() if token >= 256]
    assert control == [257, 258, 257, 258, 257]
    assert b'"<|im_end|>"' in bytes(token for token in request.prompt.tolist() if token < 256)


@pytest.fixture(scope="module")
def qwen3() -> Tokenizer:
    return Tokenizer(QWEN3)


@needs_qwen3
def test_qwens_template_gets_tools_and_history(qwen3: Tokenizer) -> None:
    body = {"model": MODEL, "messages": HISTORY, "tools": [WEATHER]}
    chat = parse(ChatBody, json.dumps(body).encode())
    messages = [message.for_template for message in chat.messages]
    text = qwen3.decode(qwen3.encode_chat(messages, chat.writing))
    assert qwen3.takes_tools
    assert json.dumps(WEATHER) in text
    assert '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 1}}' in text
    assert "<tool_response>\nrain\n</tool_response>" in text
    assert text.endswith("<|im_start|>assistant\n")
    assert "weather" not in qwen3.decode(qwen3.encode_chat([USER], Writing())).partition("How")[0]


@needs_qwen3
def test_a_forced_call_over_qwens_vocabulary(qwen3: Tokenizer) -> None:
    """Whatever tokens are drawn, a call with valid arguments comes out, its tags as own tokens."""
    body = {"model": MODEL, "messages": [USER], "tools": [WEATHER, CLOCK],
            "tool_choice": named("weather")}  # fmt: skip
    [grammar] = parse(ChatBody, json.dumps(body).encode()).held_to().values()
    token_bytes, end = TokenBytes(qwen3.raw), qwen3.raw.token_to_id("<|im_end|>")
    assert end is not None
    state = GrammarCompiler(token_bytes, qwen3.vocab_size, (end,)).compile(grammar)
    draw, tokens = np.random.default_rng(0), []
    while not state.is_complete:
        possible = np.flatnonzero(allowed_tokens(state.allowed(), qwen3.vocab_size))
        tokens.append(int(draw.choice(possible)))
        state.take(tokens[-1])
    assert tokens[0] == qwen3.raw.token_to_id("<tool_call>")
    assert tokens[-1] == qwen3.raw.token_to_id("</tool_call>")
    reader = ToolCallReader()
    text = b"".join(token_bytes[token] for token in tokens).decode()
    begun, *arguments = reader.push(text) + reader.finish()
    assert isinstance(begun, CallBegun)
    assert begun.name == "weather"
    jsonschema.validate(json.loads("".join(part.text for part in arguments)), CITY)  # pyright: ignore[reportAttributeAccessIssue]
