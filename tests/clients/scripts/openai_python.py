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
check("structured output", parsed)
check("tools", tools)
check("responses", responses)
check("responses with tools", responses_tools)
end()
