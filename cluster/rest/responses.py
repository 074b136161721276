"""`POST /v1/responses`, OpenAI's newer interface: what is asked, as the chat that it stands for.

It is stateless here: nothing is stored, and every request brings all that was said.
"""

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Discriminator, Field, Tag, WithJsonSchema
from pydantic_core import PydanticCustomError

from .fields import (
    ADVICE_OUTPUT_ITEM,
    ADVICE_RESPONSES,
    ADVICE_RESPONSES_FORMAT,
    ADVICE_RESPONSES_PART,
    ADVICE_RESPONSES_TEXT,
    UNSUPPORTED_RESPONSES,
)
from .schemas import WHOLE, Strict

LOGPROBS = "message.output_text.logprobs"
"""What `include` says for log-probabilities."""

# What the chat calls a field of the request.
_CALLED = {
    "messages": "input",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
}


def _text_or_list_of(*kinds: type[BaseModel]) -> dict[str, Any]:
    schemas = [kind.model_json_schema() for kind in kinds]
    items = schemas[0] if len(schemas) == 1 else {"anyOf": schemas}
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": items}]}


class _Part(Strict):
    """A part of an item; one of an answer comes back as it was given."""

    advice = ADVICE_RESPONSES_PART

    type: Literal["input_text", "output_text", "text"]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


def _text_of(parts: list[_Part]) -> str:
    return "\n".join(part.text for part in parts)


_Parts = Annotated[
    list[_Part],
    Field(min_length=1),
    BeforeValidator(_as_parts),
    WithJsonSchema(_text_or_list_of(_Part)),
]


class Item(Strict):
    """A message of the input, or of an answer that goes back into the next request."""

    advice = ADVICE_OUTPUT_ITEM

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: _Parts

    @property
    def as_message(self) -> dict[str, str]:
        """Of a chat."""
        return {"role": self.role, "content": _text_of(self.content)}


class CallItem(Strict):
    """A call of an earlier answer."""

    advice = ADVICE_OUTPUT_ITEM

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str

    @property
    def as_call(self) -> dict[str, Any]:
        """Of a message of a chat."""
        function = {"name": self.name, "arguments": self.arguments}
        return {"id": self.call_id, "type": "function", "function": function}


class OutputItem(Strict):
    """What came of a call."""

    advice = ADVICE_OUTPUT_ITEM

    type: Literal["function_call_output"]
    call_id: str
    output: _Parts

    @property
    def as_message(self) -> dict[str, str]:
        """Of a chat."""
        content = _text_of(self.output)
        return {"role": "tool", "tool_call_id": self.call_id, "content": content}


def _kind_of(item: Any) -> str:
    """Which of the three an item is; most messages do not say so."""
    kind = item.get("type") if isinstance(item, dict) else None
    return f"<{kind}>" if kind in ("function_call", "function_call_output") else "<message>"


AnyItem = Annotated[
    Annotated[Item, Tag("<message>")]
    | Annotated[CallItem, Tag("<function_call>")]
    | Annotated[OutputItem, Tag("<function_call_output>")],
    Discriminator(_kind_of),
]


class FunctionTool(Strict):
    """A function that may be called; the chat has the same one level deeper."""

    type: Literal["function"]
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def as_tool(self) -> dict[str, Any]:
        """Of a chat."""
        return {"type": "function", "function": self.model_dump(exclude={"type"})}


class NamedFunction(Strict):
    """`tool_choice`, where it names one."""

    type: Literal["function"]
    name: str


class TextFormat(Strict):
    """`text.format`; what it means is `response_format` of a chat."""

    advice = ADVICE_RESPONSES_FORMAT

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None

    @property
    def as_response_format(self) -> dict[str, Any]:
        """Of a chat."""
        if self.type != "json_schema":
            return {"type": self.type}
        schema = {"name": self.name or "answer", "schema": self.schema_, "strict": self.strict}
        return {"type": self.type, "json_schema": schema}


def _as_items(value: Any) -> Any:
    return [{"role": "user", "content": value}] if isinstance(value, str) else value


def _as_included(value: Any) -> Any:
    """What is included: log-probabilities are, and reasoning would be, if there were any."""
    known = (LOGPROBS, "reasoning.encrypted_content")
    for each in value if isinstance(value, list) else ():
        if each not in known:
            said = "only {known} can be included"
            raise PydanticCustomError("include", said, {"known": " and ".join(known)})  # pyright: ignore[reportArgumentType]
    return value


class TextOptions(Strict):
    """What the answer's text is to be like."""

    advice = ADVICE_RESPONSES_TEXT

    format: TextFormat | None = None


class ResponsesBody(Strict):
    """`POST /v1/responses`."""

    advice = ADVICE_RESPONSES
    unsupported = UNSUPPORTED_RESPONSES

    input: Annotated[
        list[AnyItem],
        Field(min_length=1),
        BeforeValidator(_as_items),
        WithJsonSchema(_text_or_list_of(Item, CallItem, OutputItem)),
    ]
    model: str | None = None
    instructions: str | None = None
    max_output_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    top_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    include: Annotated[list[str] | None, BeforeValidator(_as_included)] = None
    stream: bool | None = None
    text: TextOptions | None = None
    tools: list[FunctionTool] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedFunction | None = None
    parallel_tool_calls: bool | None = None
    metadata: dict[str, str] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether they are part of the answer."""
        return LOGPROBS in (self.include or ())

    @property
    def as_chat(self) -> dict[str, Any]:
        """The body of the chat that it stands for."""
        text_format = self.text.format if self.text else None
        choice = self.tool_choice
        if isinstance(choice, NamedFunction):
            choice = {"type": "function", "function": {"name": choice.name}}
        return {
            "model": self.model,
            "messages": [*self._messages()],
            "max_completion_tokens": self.max_output_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "logprobs": self.wants_logprobs,
            "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
            "stream": self.stream,
            "response_format": text_format.as_response_format if text_format else None,
            "tools": [tool.as_tool for tool in self.tools] if self.tools else None,
            "tool_choice": choice,
            "parallel_tool_calls": self.parallel_tool_calls,
        }

    def _messages(self) -> Iterator[dict[str, Any]]:
        """Calls are a part of the assistant's message before them, or of one of their own."""
        if self.instructions is not None:
            yield {"role": "system", "content": self.instructions}
        waiting: dict[str, Any] | None = None
        for item in self.input:
            if isinstance(item, CallItem):
                waiting = waiting or {"role": "assistant", "content": None}
                waiting.setdefault("tool_calls", []).append(item.as_call)
                continue
            if waiting is not None:
                yield waiting
            message = item.as_message
            waiting = message if message["role"] == "assistant" else None
            if waiting is None:
                yield message
        if waiting is not None:
            yield waiting

    @property
    def repeated(self) -> dict[str, Any]:
        """What the answer repeats of the request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "tools": [tool.model_dump() for tool in self.tools or ()],
            "tool_choice": _dumped(self.tool_choice) or "auto",
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "text": _dumped(self.text) or {"format": {"type": "text"}},
        }


def _dumped(value: object) -> Any:
    """As JSON has it."""
    if isinstance(value, BaseModel):
        return value.model_dump(exclude_none=True, by_alias=True)
    return value


def in_its_words(field: str | None) -> str | None:
    """What a field of the chat is called in this request."""
    return _CALLED.get((field or "").partition(".")[0], field)
