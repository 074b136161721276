"""`POST /v1/responses`, OpenAI's newer interface: what is asked, as the chat that it stands for.

It is stateless here: nothing is stored, and every request brings all that was said.
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, WithJsonSchema
from pydantic_core import PydanticCustomError

from .errors import RestError
from .fields import (
    ADVICE_OUTPUT_ITEM,
    ADVICE_RESPONSES,
    ADVICE_RESPONSES_PART,
    ADVICE_RESPONSES_TEXT,
    UNSUPPORTED_RESPONSES,
    UNSUPPORTED_RESPONSES_TEXT,
)
from .schemas import WHOLE, ChatBody, Strict

LOGPROBS = "message.output_text.logprobs"
"""What `include` says for log-probabilities."""

# What the chat calls a field of the request.
_CALLED = {"messages": "input", "max_completion_tokens": "max_output_tokens"}


def _text_or_list_of(kind: type[BaseModel]) -> dict[str, Any]:
    items = kind.model_json_schema()
    return {"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "items": items}]}


class _Part(Strict):
    """A part of an item; one of an answer comes back as it was given."""

    advice = ADVICE_RESPONSES_PART

    type: Literal["input_text", "output_text", "text"]
    text: str


def _as_parts(value: Any) -> Any:
    return [{"type": "input_text", "text": value}] if isinstance(value, str) else value


class Item(Strict):
    """A message of the input, or of an answer that goes back into the next request."""

    advice = ADVICE_OUTPUT_ITEM

    type: Literal["message"] | None = None
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[_Part],
        Field(min_length=1),
        BeforeValidator(_as_parts),
        WithJsonSchema(_text_or_list_of(_Part)),
    ]

    @property
    def as_message(self) -> dict[str, str]:
        """Of a chat."""
        return {"role": self.role, "content": "\n".join(part.text for part in self.content)}


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
    unsupported = UNSUPPORTED_RESPONSES_TEXT


class ResponsesBody(Strict):
    """`POST /v1/responses`."""

    advice = ADVICE_RESPONSES
    unsupported = UNSUPPORTED_RESPONSES

    input: Annotated[
        list[Item],
        Field(min_length=1),
        BeforeValidator(_as_items),
        WithJsonSchema(_text_or_list_of(Item)),
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
    metadata: dict[str, str] | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether they are part of the answer."""
        return LOGPROBS in (self.include or ())

    @property
    def as_chat(self) -> ChatBody:
        """The chat that it stands for."""
        instructions = [] if self.instructions is None else [self.instructions]
        messages = [{"role": "system", "content": each} for each in instructions]
        messages += [item.as_message for item in self.input]
        return ChatBody.model_validate(
            {
                "model": self.model,
                "messages": messages,
                "max_completion_tokens": self.max_output_tokens,
                "temperature": self.temperature,
                "top_p": self.top_p,
                "logprobs": self.wants_logprobs,
                "top_logprobs": self.top_logprobs if self.wants_logprobs else None,
                "stream": self.stream,
            }
        )

    @property
    def repeated(self) -> dict[str, Any]:
        """What the answer repeats of the request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "temperature": 1.0 if self.temperature is None else self.temperature,
            "top_p": 1.0 if self.top_p is None else self.top_p,
        }


def in_its_words(error: RestError) -> RestError:
    """An error of the chat, with the name that its field has in this request."""
    if error.param in _CALLED:
        error.param = _CALLED[error.param]
    return error
