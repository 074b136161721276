"""The openai package for Python."""

import json

import openai
from checks import BASE_URL, MODEL, MOST_TOKENS, TEXT, check, end
from pydantic import BaseModel

client = openai.OpenAI(base_url=BASE_URL, api_key="none", max_retries=0, timeout=120)
MESSAGES = [{"role": "user", "content": TEXT}]
COMMON = {"model": MODEL, "temperature": 0}


class City(BaseModel):
    name: str
    inhabitants: int


TOOL = {
    "type": "function",
    "function": {
        "name": "find",
        "description": "Finds a city.",
        "parameters": {
            "type": "object",
            "properties": {"name": {"type": "string", "maxLength": 8}},
            "required": ["name"],
            "additionalProperties": False,
        },
    },
}


def chat() -> None:
    answer = client.chat.completions.create(messages=MESSAGES, max_tokens=MOST_TOKENS, **COMMON)
    assert answer.choices[0].message.content
    assert answer.usage.completion_tokens


def chat_streamed() -> None:
    options = {"include_usage": True}
    chunks = list(
        client.chat.completions.create(
            messages=MESSAGES, max_tokens=MOST_TOKENS, stream=True, stream_options=options, **COMMON
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert chunks[-1].usage.total_tokens


def named_once() -> None:
    headers = {"x-request-id": "mine-1"}
    answer = client.chat.completions.with_raw_response.create(
        messages=MESSAGES, max_tokens=1, extra_headers=headers, **COMMON
    )
    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert "mine-1" in answer.parse().id


def choices() -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, max_tokens=MOST_TOKENS, model=MODEL, temperature=1, n=2, seed=1,
        logprobs=True, top_logprobs=2, stop=["\n"],
    )  # fmt: skip
    assert [choice.index for choice in answer.choices] == [0, 1]
    for choice in answer.choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)


def vllms_fields() -> None:
    held = {"structured_outputs": {"choice": ["left", "right"]}}
    answer = client.chat.completions.create(messages=MESSAGES, extra_body=held, **COMMON)
    assert answer.choices[0].message.content in ("left", "right")


def parsed() -> None:
    answer = client.chat.completions.parse(
        messages=MESSAGES, max_tokens=200, response_format=City, **COMMON
    )
    choice = answer.choices[0]
    if choice.finish_reason == "stop":
        assert isinstance(choice.message.parsed, City)


def tools() -> None:
    answer = client.chat.completions.create(
        messages=MESSAGES, max_tokens=200, tools=[TOOL], tool_choice="required", **COMMON
    )
    [call, *_] = answer.choices[0].message.tool_calls
    assert call.function.name == "find"
    assert isinstance(json.loads(call.function.arguments)["name"], str)


def tools_streamed() -> None:
    forced = {"type": "function", "function": {"name": "find"}}
    with client.chat.completions.stream(
        messages=MESSAGES, max_tokens=200, tools=[TOOL], tool_choice=forced, **COMMON
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.done" in kinds
    [call] = final.choices[0].message.tool_calls
    assert isinstance(json.loads(call.function.arguments)["name"], str)


def what_came_of_a_call() -> None:
    call = {"id": "a", "type": "function", "function": {"name": "find", "arguments": "{}"}}
    history = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "4711"},
    ]
    assert client.chat.completions.create(
        messages=history, tools=[TOOL], max_tokens=MOST_TOKENS, **COMMON
    ).choices[0].finish_reason in ("stop", "length")


def responses() -> None:
    answer = client.responses.create(input=TEXT, max_output_tokens=MOST_TOKENS, **COMMON)
    assert answer.output_text
    with client.responses.stream(input=TEXT, max_output_tokens=MOST_TOKENS, **COMMON) as stream:
        text = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    assert text == answer.output_text


def responses_tools() -> None:
    tool = {"type": "function", **TOOL["function"]}
    answer = client.responses.create(
        input=TEXT, max_output_tokens=200, tools=[tool], tool_choice="required", **COMMON
    )
    assert any(item.type == "function_call" for item in answer.output)


check("models", lambda: client.models.list().data[0].id)
check("chat", chat)
check("chat, streamed", chat_streamed)
check("completions", lambda: client.completions.create(prompt=TEXT, max_tokens=8, **COMMON))
check("one request id", named_once)
check("several choices with log-probabilities", choices)
check("vLLM's fields", vllms_fields)
check("structured output", parsed)
check("tools", tools)
check("tools, streamed", tools_streamed)
check("a tool's result", what_came_of_a_call)
check("responses", responses)
check("responses with tools", responses_tools)
end()
