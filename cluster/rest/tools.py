"""Tools that a chat may call: what a request says of them, and what holds an answer to a call.

Calls are written as Qwen's models write them: between `<tool_call>` and `</tool_call>`, an object
with `name` and `arguments`. `tool_calls` reads them.
"""

import json
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from .errors import invalid
from .grammars import bounded, json_rule

CALL_BEGIN = "<tool_call>"
CALL_END = "</tool_call>"

_MOST_TOOLS = 128
_MOST_CALLS = 16


class _Section(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class Function(_Section):
    """What one tool is called, what it is for, and the schema of its arguments."""

    name: Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None

    @property
    def arguments_rule(self) -> str:
        """The right side of a grammar's rule for its arguments."""
        schema = {"type": "object", **(self.parameters or {})}
        return json_rule(schema, strict=bool(self.strict))


class Tool(_Section):
    """One of `tools`."""

    type: Literal["function"]
    function: Function


class _NamedFunction(_Section):
    name: str


class NamedTool(_Section):
    """`tool_choice`, where it names one."""

    type: Literal["function"]
    function: _NamedFunction


class ToolFields(BaseModel):
    """The fields of a chat that are about tools."""

    tools: Annotated[list[Tool], Field(max_length=_MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None

    @property
    def offered(self) -> list[dict[str, Any]]:
        """The tools that the model is told of, as chat templates know them."""
        if self.tool_choice == "none":
            return []
        return [tool.model_dump(exclude_none=True) for tool in self.tools or ()]

    @property
    def one_call(self) -> bool:
        """Whether an answer has one call at most."""
        return self.parallel_tool_calls is False or isinstance(self.tool_choice, NamedTool)

    def called(self) -> dict[str, str]:
        """`tool_choice` and its grammar, where it asks for a call.

        Raises:
            RestError: there is no such tool.
        """
        functions = [tool.function for tool in self.tools or ()]
        asked = self.tool_choice
        if isinstance(asked, NamedTool):
            functions = [each for each in functions if each.name == asked.function.name]
        elif asked != "required":
            return {}
        if not functions:
            what = "no such tool" if isinstance(asked, NamedTool) else "no tool"
            raise invalid(f"tool_choice: {what} is among tools", "tool_choice", "invalid_value")
        return {"tool_choice": bounded(_calls(functions, self.one_call), "tools")}


def _calls(functions: list[Function], one_call: bool) -> str:
    """A grammar of one call or several."""
    more = "" if one_call else f' ("\\n" call){{0,{_MOST_CALLS - 1}}}'
    begin, end = json.dumps(f"{CALL_BEGIN}\n"), json.dumps(f"\n{CALL_END}")
    names = " | ".join(f"function_{index}" for index in range(len(functions)))
    rules = [f"start: call{more}", f"call: {begin} ({names}) {end}"]
    for index, function in enumerate(functions):
        opening = json.dumps(f'{{"name": {json.dumps(function.name)}, "arguments": ')
        rules.append(f'function_{index}: {opening} arguments_{index} "}}"')
        rules.append(f"arguments_{index}: {function.arguments_rule}")
    return "\n".join(rules)


class CalledFunction(_Section):
    """`function` of a call in a message. `arguments` is JSON as text."""

    name: str
    arguments: str


class MadeCall(_Section):
    """One of a message's `tool_calls`."""

    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: CalledFunction

    @property
    def for_template(self) -> dict[str, Any]:
        """As chat templates know calls: with the arguments as an object, where they are one."""
        return {
            "id": self.id,
            "type": self.type,
            "function": {
                "name": self.function.name,
                "arguments": _as_object(self.function.arguments),
            },
        }


def _as_object(arguments: str) -> Any:
    """What a model wrote need not be JSON; such arguments are given back as they came."""
    try:
        value = json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments
    return value if isinstance(value, dict) else arguments
