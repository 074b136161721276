"""The description of the endpoint that `/openapi.json` gives and `/docs` shows.

Bodies are parsed by hand, so FastAPI knows nothing about them: their schemas come from `schemas`,
with the limits of this server in them.
"""

from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from openai.types import Completion, Model
from openai.types.chat import ChatCompletion
from openai.types.responses import Response
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from .limits import IngressLimits
from .responses import ResponsesBody
from .schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody

Schema = dict[str, Any]
_BODIES = (ChatBody, CompletionBody, ResponsesBody, TokenizeBody, DetokenizeBody)
_REFERENCE = "#/components/schemas/{model}"
# Of one event.
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
_EVENTS = {"text/event-stream": {"schema": _EVENT}}


class ErrorDetails(BaseModel):
    """What went wrong, for people and for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """Every answer with a status of 400 or more."""

    error: ErrorDetails


class ModelList(BaseModel):
    """The models of this server: one."""

    object: str
    data: list[Model]


class TokenizeAnswer(BaseModel):
    """Token ids of a text or a chat."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str | None] | None


class DetokenizeAnswer(BaseModel):
    """The text of token ids."""

    prompt: str


class TokenizerInfo(BaseModel):
    """What the model's `tokenizer_config.json` says, and its chat template."""

    model_config = ConfigDict(extra="allow")

    chat_template: str | None


class Status(BaseModel):
    """Of the server."""

    status: str


class Version(BaseModel):
    """What runs."""

    version: str


_ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "Refused; the error says why"},
    "5XX": {"model": ErrorBody, "description": "Failed, or not to be served now"},
}


def answers(model: type[BaseModel], **more: Any) -> dict[str, Any]:
    """For a path: what it answers with."""
    return {"responses": {200: {"model": model, "description": "Answered", **more}, **_ERRORS}}


def takes(body: type[BaseModel]) -> dict[str, Any]:
    """For a path: what it wants sent."""
    reference = {"$ref": _REFERENCE.format(model=body.__name__)}
    content = {"application/json": {"schema": reference}}
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


CHAT = {**takes(ChatBody), **answers(ChatCompletion, content=_EVENTS)}
COMPLETION = {**takes(CompletionBody), **answers(Completion, content=_EVENTS)}
RESPONSES = {**takes(ResponsesBody), **answers(Response, content=_EVENTS)}
TOKENIZE = {**takes(TokenizeBody), **answers(TokenizeAnswer)}
DETOKENIZE = {**takes(DetokenizeBody), **answers(DetokenizeAnswer)}
MODELS = answers(ModelList)
MODEL = answers(Model)
TOKENIZER_INFO = answers(TokenizerInfo)
STATUS = answers(Status)
VERSION = answers(Version)


def describe(api: FastAPI, limits: IngressLimits, vocab_size: int, keyed: bool) -> Schema:
    """The whole description; takes a while.

    Args:
        vocab_size: one more than the highest token id.
        keyed: whether clients need an API key.
    """
    page = get_openapi(
        title=api.title, version=api.version, routes=api.routes, description=_DESCRIPTION
    )
    _, bodies = models_json_schema(
        [(body, "validation") for body in _BODIES], ref_template=_REFERENCE
    )
    schemas = page.setdefault("components", {}).setdefault("schemas", {})
    # A copy, because parts of it are the constants that `schemas` has.
    schemas |= deepcopy(bodies["$defs"])
    for body in _BODIES:
        properties = schemas[body.__name__]["properties"]
        for name, kind, more in _limits_of(body, limits, vocab_size):
            _narrow(properties.get(name), kind, more)
    if keyed:
        page["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        page["security"] = [{"key": []}]
    return page


_DESCRIPTION = (
    "OpenAI's interface for prompts of up to a million tokens. Fields that do not go together, and "
    "prompts and answers that are longer than the model's context together, are refused with 400."
)


def _limits_of(
    body: type[BaseModel], limits: IngressLimits, vocab_size: int
) -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """A field, a type that it may have, and what this server's limits add to the schema of that."""
    token = {"minimum": 0, "maximum": vocab_size - 1}
    most_tokens = {"maximum": limits.max_output_tokens}
    most_logprobs = {"maximum": limits.max_logprobs}
    yield "model", "string", {"enum": [limits.model_name]}
    yield "n", "integer", {"maximum": limits.max_choices}
    yield "min_tokens", "integer", most_tokens
    yield "logit_bias", "object", {"propertyNames": {"pattern": "^[0-9]{1,9}$"}}
    if not limits.clamp_max_tokens:
        yield "max_tokens", "integer", most_tokens
        yield "max_completion_tokens", "integer", most_tokens
        yield "max_output_tokens", "integer", most_tokens
    yield "top_logprobs", "integer", most_logprobs
    yield "prompt_logprobs", "integer", most_logprobs
    if body is CompletionBody:
        yield "logprobs", "integer", most_logprobs
        yield "prompt", "integer", token
    yield "stop_token_ids", "integer", token
    yield "tokens", "integer", token


def _narrow(schema: object, kind: str, more: Mapping[str, Any]) -> None:
    """Add to every schema of a type within a schema."""
    if isinstance(schema, dict):
        for inner in schema.values():
            _narrow(inner, kind, more)
        if schema.get("type") == kind:
            schema.update(more)
    elif isinstance(schema, list):
        for inner in schema:
            _narrow(inner, kind, more)
