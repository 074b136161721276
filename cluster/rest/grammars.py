"""Fields that hold an answer to a form, and the grammars that they come to.

OpenAI's `response_format`; vLLM's `structured_outputs`, and `guided_*` as it was called before.
"""

import json
import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import RestError, invalid

MOST_GRAMMAR_CHARACTERS = 1 << 17
"""Of one grammar, or of the JSON of a schema."""

_MOST_CHOICES = 4096
# JSON in one line, with the spaces that models write; more would let an answer run away.
_ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ?", "key_separator": ": ?"}
_COMPACT = {"whitespace_flexible": False}
_ANY_OBJECT: dict[str, Any] = {"type": "object"}

Schema = dict[str, Any] | bool


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class NamedSchema(_Section):
    """`response_format.json_schema`."""

    name: str
    description: str | None = None
    schema_: Schema = Field(True, alias="schema")
    strict: bool | None = None


class ResponseFormat(_Section):
    """OpenAI's `response_format`."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"type": {"enum": ["text", "json_object"]}}},
                {"properties": {"json_schema": {"type": "object"}}, "required": ["json_schema"]},
            ]
        }
    )

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class StructuredOutputs(_Section):
    """vLLM's `structured_outputs`: one of the first five."""

    json_: dict[str, Any] | bool | str | None = Field(None, alias="json")
    regex: str | None = None
    choice: list[str] | None = Field(None, min_length=1, max_length=_MOST_CHOICES)
    grammar: str | None = None
    json_object: bool | None = None
    disable_any_whitespace: bool | None = None
    whitespace_pattern: str | None = None


class HeldFields(BaseModel):
    """The fields of both generating endpoints that hold an answer to a form."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | bool | str | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = Field(None, min_length=1, max_length=_MOST_CHOICES)
    guided_grammar: str | None = None
    guided_whitespace_pattern: str | None = None

    def held_to(self) -> dict[str, str]:
        """From each field that is used to its grammar; more than one do not go together.

        Those that clients write themselves are as they came: Lark, or GBNF.

        Raises:
            RestError: a field holds no schema, or no grammar.
        """
        return {
            param: bounded(grammar, param)
            for param, grammar in (*self._by_format(), *self._by_outputs(), *self._guided())
        }

    def _by_format(self) -> Iterator[tuple[str, str]]:
        form = self.response_format
        if form is None or form.type == "text":
            return
        if form.type == "json_object":
            yield "response_format", json_grammar(_ANY_OBJECT)
            return
        if form.json_schema is None:
            param = "response_format.json_schema"
            raise invalid(f"'{param}' is required", param, "missing_required_parameter")
        strict = bool(form.json_schema.strict)
        yield "response_format", json_grammar(form.json_schema.schema_, strict=strict)

    def _by_outputs(self) -> Iterator[tuple[str, str]]:
        outputs = self.structured_outputs
        if outputs is None:
            return
        space = "" if outputs.disable_any_whitespace else outputs.whitespace_pattern
        name = "structured_outputs"
        if outputs.json_ is not None:
            yield f"{name}.json", _of_json(outputs.json_, f"{name}.json", space)
        if outputs.regex is not None:
            yield f"{name}.regex", regex_grammar(outputs.regex)
        if outputs.choice is not None:
            yield f"{name}.choice", choice_grammar(outputs.choice)
        if outputs.grammar is not None:
            yield f"{name}.grammar", outputs.grammar
        if outputs.json_object:
            yield f"{name}.json_object", json_grammar(_ANY_OBJECT, space)

    def _guided(self) -> Iterator[tuple[str, str]]:
        if self.guided_json is not None:
            space = self.guided_whitespace_pattern
            yield "guided_json", _of_json(self.guided_json, "guided_json", space)
        if self.guided_regex is not None:
            yield "guided_regex", regex_grammar(self.guided_regex)
        if self.guided_choice is not None:
            yield "guided_choice", choice_grammar(self.guided_choice)
        if self.guided_grammar is not None:
            yield "guided_grammar", self.guided_grammar


def json_grammar(schema: Schema, white_space: str | None = None, strict: bool = True) -> str:
    """JSON that a schema accepts.

    Args:
        white_space: a pattern for what may stand between the parts of JSON; "" for nothing. By
            default all is in one line.
        strict: refuse a schema with keywords that cannot be held to, instead of leaving them out.
    """
    return f"start: {json_rule(schema, white_space, strict)}"


def json_rule(schema: Schema, white_space: str | None = None, strict: bool = True) -> str:
    """The right side of a rule for JSON that a schema accepts; as `json_grammar`."""
    options: dict[str, Any] = {"lenient": not strict, "coerce_one_of": not strict}
    if white_space is None:
        options |= _ONE_LINE
    else:
        options |= {"whitespace_pattern": white_space} if white_space else _COMPACT
    if isinstance(schema, bool):
        schema = {} if schema else {"enum": []}
    return f"%json {json.dumps({**schema, 'x-guidance': options}, ensure_ascii=False)}"


def regex_grammar(pattern: str) -> str:
    """Text that a regular expression matches as a whole."""
    escaped = re.sub(
        r"\\.|/|\n",
        lambda found: {"/": r"\/", "\n": r"\n"}.get(found[0], found[0]),
        pattern,
        flags=re.DOTALL,
    )
    # An empty pattern would be the beginning of a comment.
    return f"start: /{escaped or '()'}/"


def choice_grammar(choices: list[str]) -> str:
    """One of several texts."""
    return f"start: {' | '.join(json.dumps(each, ensure_ascii=False) for each in choices)}"


def _of_json(schema: Schema | str, param: str, white_space: str | None) -> str:
    """vLLM takes a schema's JSON as text as well."""
    if isinstance(schema, str):
        bounded(schema, param)
        try:
            schema = json.loads(schema)
        except (ValueError, RecursionError) as error:
            raise invalid(f"{param}: not valid JSON: {error}", param, "invalid_value") from error
        if not isinstance(schema, dict | bool):
            raise invalid(f"{param}: a schema is an object", param, "invalid_value")
    return json_grammar(schema, white_space)


def bounded(grammar: str, param: str) -> str:
    """The grammar.

    Raises:
        RestError: it is too large.
    """
    if len(grammar) > MOST_GRAMMAR_CHARACTERS:
        raise _too_large(param)
    return grammar


def _too_large(param: str) -> RestError:
    return invalid(
        f"{param}: at most {MOST_GRAMMAR_CHARACTERS} characters are compiled; send a smaller one",
        param,
        "invalid_value",
    )
