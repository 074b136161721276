"""What requests may say, field by field.

Types are strict but for whole numbers, which may be written 16.0, and a field nobody knows is
refused. `fields` has those of OpenAI's and vLLM's that are known and not acted on.
"""

import codecs
from dataclasses import replace
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import pydantic_core
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from ...engine.text.tokenizer import Writing
from .errors import INCONSISTENT, RestError, invalid, shown
from .fields import (
    ADVICE,
    ADVICE_MESSAGE,
    ADVICE_PART,
    ADVICE_STREAM,
    ADVICE_TOKENIZE,
    UNSUPPORTED_CHAT,
    UNSUPPORTED_COMPLETION,
    UNSUPPORTED_MESSAGE,
    UNSUPPORTED_TOKENIZE,
    Neutral,
    asks_for_nothing,
)
from .grammars import HeldFields
from .tools import MadeCall, ToolFields


class Strict(BaseModel):
    """Refuses what it does not know and what is not supported, the first field as sent."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    advice: ClassVar[frozenset[str]] = frozenset()
    unsupported: ClassVar[Neutral] = {}

    @model_validator(mode="before")
    @classmethod
    def _take_what_it_knows(cls, body: Any) -> Any:
        if not isinstance(body, dict):
            return body
        fields = {field.alias or name for name, field in cls.model_fields.items()}
        for name, value in body.items():
            known = name in fields or name in cls.advice
            if not known and not asks_for_nothing(value, cls.unsupported.get(name, ())):
                raise _refused_field(name, name in cls.unsupported)
        return {name: value for name, value in body.items() if name in fields}

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """With the fields that change nothing, and what may be said in those not supported."""
        reference = handler(core_schema)
        schema = handler.resolve_ref_schema(reference)
        properties = schema.setdefault("properties", {})
        for name in sorted(cls.advice):
            properties.setdefault(name, {"description": "Accepted; changes nothing."})
        for name in sorted(cls.unsupported):
            properties.setdefault(name, {"enum": [*cls.unsupported[name], None]})
        schema["additionalProperties"] = {"type": "null"}
        return reference


def _refused_field(name: str, is_known: bool) -> PydanticCustomError:
    if is_known:
        said = "'{name}' is not supported by this server; leave it out"
        return PydanticCustomError("unsupported_field", said, {"name": name})
    said = "unknown field; leave it out"
    return PydanticCustomError("unknown_field", said, {"name": name})  # pyright: ignore[reportArgumentType]


def _as_whole(value: Any) -> Any:
    """16.0 is 16: some languages write all numbers so."""
    is_whole = isinstance(value, float) and value.is_integer()
    return int(value) if is_whole else value


def _as_wholes(value: Any) -> Any:
    """The same of a list; of a million, nearly always, not one is touched."""
    if isinstance(value, list) and float in set(map(type, value)):
        return [_as_whole(each) for each in value]
    return value


WHOLE = BeforeValidator(_as_whole)
_WHOLES = BeforeValidator(_as_wholes)


class TextPart(Strict):
    """A part of a message. Only text is supported."""

    advice = ADVICE_PART

    type: Literal["text"]
    text: str


def _as_content(value: Any) -> str:
    """The text of a message; text parts are joined by line breaks, as vLLM does."""
    if isinstance(value, str):
        return value
    if not isinstance(value, list) or not value:
        raise PydanticCustomError(
            "content_type", "content must be a string or a list of text parts"
        )
    for part in value:
        if isinstance(part, dict) and part.get("type") != "text":
            raise PydanticCustomError(
                "content_part", "only content parts of type 'text' are supported"
            )
    return "\n".join(TextPart.model_validate(part).text for part in value)


_CONTENT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            {"type": "string"},
            {"type": "array", "minItems": 1, "items": TextPart.model_json_schema()},
        ]
    }
)


class Message(Strict):
    """One message. `developer` is what newer OpenAI models call `system`."""

    advice = ADVICE_MESSAGE
    unsupported = UNSUPPORTED_MESSAGE

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[str, BeforeValidator(_as_content), _CONTENT_SCHEMA]
    name: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[MadeCall] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _an_answer_may_be_calls_alone(cls, message: Any) -> Any:
        if isinstance(message, dict) and message.get("role") == "assistant":
            return {**message, "content": message.get("content") or ""}
        return message

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates know messages."""
        role = "system" if self.role == "developer" else self.role
        reasoning = self.reasoning if self.reasoning_content is None else self.reasoning_content
        given = {
            "name": self.name,
            "reasoning_content": reasoning,
            "tool_calls": [call.for_template for call in self.tool_calls or ()] or None,
            "tool_call_id": self.tool_call_id,
        }
        optional = {name: value for name, value in given.items() if value is not None}
        return {"role": role, "content": self.content, **optional}


class StreamOptions(Strict):
    """`continuous_usage_stats`, vLLM's, asks for usage so far in every chunk."""

    advice = ADVICE_STREAM

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


_MOST_STOP_STRING = 1024
_MOST_STOP_STRINGS = 16
StopString = Annotated[str, Field(min_length=1, max_length=_MOST_STOP_STRING)]
_STOP_STRING_SCHEMA = {"type": "string", "maxLength": _MOST_STOP_STRING}
_STOP_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            _STOP_STRING_SCHEMA,
            {"type": "array", "maxItems": _MOST_STOP_STRINGS, "items": _STOP_STRING_SCHEMA},
            {"type": "null"},
        ]
    }
)


def _inconsistent(param: str, message: str) -> PydanticCustomError:
    """Fields that do not go together; `param` is the one to change."""
    return PydanticCustomError("inconsistent", message, {"param": param})  # pyright: ignore[reportArgumentType]


def _as_stop(value: Any) -> Any:
    """Empty strings stop nothing."""
    strings = [value] if isinstance(value, str) else value
    return [each for each in strings if each != ""] if isinstance(strings, list) else strings


class GenerationBody(HeldFields, Strict):
    """What both generating endpoints understand. Null means the default everywhere."""

    advice = ADVICE

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1), WHOLE] | None = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=_MOST_STOP_STRINGS)] | None,
        BeforeValidator(_as_stop),
        _STOP_SCHEMA,
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63), WHOLE] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Field(max_length=1024)]
        | None
    ) = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    # Extensions, named as vLLM names them.
    top_k: Annotated[int, Field(ge=-1), WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    # Logits are divided by it, and must stay finite.
    repetition_penalty: Annotated[float, Field(ge=0.01, le=2)] | None = None
    stop_token_ids: Annotated[list[int], Field(max_length=128), _WHOLES] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    request_id: str | None = None
    prompt_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None
    skip_special_tokens: bool | None = None

    # As llama.cpp names it.
    return_progress: bool | None = None


class _Templated(Strict):
    """How the chat template writes messages."""

    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _one_end(self) -> "_Templated":
        if self.continue_final_message and self.add_generation_prompt:
            raise _inconsistent(
                "continue_final_message",
                "continue_final_message and add_generation_prompt exclude each other",
            )
        return self

    @property
    def writing(self) -> Writing:
        """As the tokenizer knows it."""
        return Writing(
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=bool(self.continue_final_message),
            variables=self.chat_template_kwargs or {},
        )


class ChatBody(ToolFields, GenerationBody, _Templated):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"top_logprobs": {"enum": [0, None]}}},
                {"properties": {"logprobs": {"const": True}}, "required": ["logprobs"]},
            ]
        }
    )
    unsupported = UNSUPPORTED_CHAT

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: Annotated[int, Field(ge=1), WHOLE] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0), WHOLE] | None = None

    @property
    def writing(self) -> Writing:
        """The template is told of the tools as well."""
        return replace(super().writing, tools=self.offered)

    def held_to(self) -> dict[str, str]:
        """As `HeldFields.held_to`; a call that must be made is a form as well."""
        return {**super().held_to(), **self.called()}

    @model_validator(mode="after")
    def _consistent(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise _inconsistent("top_logprobs", 'top_logprobs needs "logprobs": true')
        both = (self.max_tokens, self.max_completion_tokens)
        if None not in both and both[0] != both[1]:
            raise _inconsistent(
                "max_tokens", "max_tokens and max_completion_tokens differ; send one of them"
            )
        return self


Prompt = str | list[int]

_IDS_SCHEMA = {"type": "array", "minItems": 1, "items": {"type": "integer"}}
_TEXT_SCHEMA = {"type": "string", "minLength": 1}
_PROMPT_SCHEMA = WithJsonSchema(
    {
        "anyOf": [
            _TEXT_SCHEMA,
            _IDS_SCHEMA,
            {"type": "array", "minItems": 1, "items": {"anyOf": [_TEXT_SCHEMA, _IDS_SCHEMA]}},
        ]
    }
)


def _as_prompts(value: Any) -> list[Prompt]:
    """One prompt or several, each text or token ids.

    Done by hand because a million ids must not be tried against every member of a union.
    """
    one = _as_prompt(value)
    if one is not None:
        return [one]
    several = [_as_prompt(each) for each in value] if isinstance(value, list) else []
    prompts = [each for each in several if each is not None]
    if not prompts or len(prompts) < len(several):
        raise PydanticCustomError(
            "prompt_type",
            "prompt must be a string, a list of token ids, or a list of these, not empty",
        )
    return prompts


def _as_prompt(value: Any) -> Prompt | None:
    """Text or token ids; None for anything else. Each look at a million ids takes its time."""
    if isinstance(value, str):
        return value
    kinds = set(map(type, value)) if isinstance(value, list) else set()
    if float in kinds:
        value = [_as_whole(each) for each in value]
        kinds = set(map(type, value))
    return value if kinds == {int} else None


def _as_count(value: Any) -> Any:
    """Chats say whether, completions how many; who sends the one for the other is understood."""
    if isinstance(value, bool):
        return 1 if value else None
    return _as_whole(value)


_COUNT_SCHEMA = WithJsonSchema(
    {"anyOf": [{"type": "integer", "minimum": 0}, {"type": "boolean"}, {"type": "null"}]}
)


class CompletionBody(GenerationBody):
    """`POST /v1/completions`."""

    unsupported = UNSUPPORTED_COMPLETION

    prompt: Annotated[Any, BeforeValidator(_as_prompts), _PROMPT_SCHEMA]
    # With 0 the prompt alone is looked at.
    max_tokens: Annotated[int, Field(ge=0), WHOLE] | None = None
    echo: bool | None = None
    # As llama.cpp names it: what is written as a control token is one.
    parse_special: bool | None = None
    logprobs: Annotated[
        Annotated[int, Field(ge=0)] | None, BeforeValidator(_as_count), _COUNT_SCHEMA
    ] = None

    @property
    def prompts(self) -> list[Prompt]:
        """The prompts, in the order of the answer's choices."""
        return self.prompt


class TokenizeBody(_Templated):
    """`POST /tokenize`: of a prompt, or of messages as the chat template writes them."""

    model_config = ConfigDict(
        json_schema_extra={
            "oneOf": [
                {"properties": {"prompt": {"type": "string"}}, "required": ["prompt"]},
                {"properties": {"messages": {"type": "array"}}, "required": ["messages"]},
            ]
        }
    )
    advice = ADVICE_TOKENIZE
    unsupported = UNSUPPORTED_TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> "TokenizeBody":
        if (self.prompt is None) == (self.messages is None):
            raise _inconsistent("prompt", "send either prompt or messages")
        return self


class DetokenizeBody(Strict):
    """`POST /detokenize`."""

    model: str | None = None
    tokens: Annotated[list[int], _WHOLES]


Body = TypeVar("Body", bound=BaseModel)


def parse(kind: type[Body], body: bytes | bytearray, most_messages: int | None = None) -> Body:
    """Read a request body.

    Args:
        most_messages: that could be served; more are refused before each is looked at.

    Raises:
        RestError: with the first thing that is wrong, and the field it is wrong in.
    """
    try:
        value = pydantic_core.from_json(body.removeprefix(codecs.BOM_UTF8), allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"the body is not valid JSON in UTF-8: {error}") from error
    messages = value.get("messages") if isinstance(value, dict) else None
    if isinstance(messages, list) and most_messages is not None and len(messages) > most_messages:
        raise invalid(
            f"messages: {len(messages)} are more than the {most_messages} that fit into this "
            "model's context; send fewer",
            "messages",
            "context_length_exceeded",
        )
    return checked(kind, value)


def checked(kind: type[Body], value: Any) -> Body:
    """A body that is parsed already.

    Raises:
        RestError: as `parse`.
    """
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        raise _first_problem(error) from error


def _first_problem(error: ValidationError) -> RestError:
    problem = error.errors(include_url=False, include_context=True, include_input=False)[0]
    # A part in angle brackets is no field: it says which of several kinds was meant.
    parts = [str(part) for part in problem["loc"]]
    where = ".".join(part for part in parts if not part.startswith("<"))
    context = problem.get("ctx", {})
    match problem["type"]:
        case "unsupported_field":
            where = ".".join(filter(None, (where, str(context["name"]))))
            return invalid(problem["msg"], where, "unsupported_parameter")
        case "unknown_field":
            where = ".".join(filter(None, (where, str(context["name"]))))
            said = f"unknown field '{shown(where)}'; leave it out"
            return invalid(said, where, "unknown_parameter")
        case "missing":
            return invalid(f"'{where}' is required", where, "missing_required_parameter")
        case "inconsistent":
            return invalid(problem["msg"], str(context["param"]), INCONSISTENT)
        case "model_type" | "model_attributes_type":
            # Its own words name a class of ours.
            return invalid(
                f"{shown(where) or 'the body'} must be an object", where or None, "invalid_value"
            )
    message = problem["msg"]
    where = shown(where)
    return invalid(f"{where}: {message}" if where else message, where or None, "invalid_value")
