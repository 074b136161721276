"""Reads the calls of tools in a model's answer, as far as it has come.

An answer is text, with calls in between: `<tool_call>`, an object with `name` and `arguments`, and
`</tool_call>`. Arguments are handed on as they come, once the name is there. What looks like a call
and is none is text.
"""

import json
import re
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from .tools import CALL_BEGIN, CALL_END

_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)', re.S)


@dataclass(frozen=True)
class Content:
    """Text beside calls."""

    text: str


@dataclass(frozen=True)
class CallBegun:
    """A call begins; its arguments follow."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class Arguments:
    """A part of the JSON of a call's arguments."""

    index: int
    text: str


Piece = Content | CallBegun | Arguments


class _State(Enum):
    TEXT = "text"
    HEAD = "head"
    ARGUMENTS = "arguments"
    TAIL = "tail"
    OVER = "over"


class ToolCallReader:
    """Reads one choice of an answer, in whatever parts it comes.

    Args:
        one_call: what comes after the first call is left out.
    """

    def __init__(self, one_call: bool = False) -> None:
        self._one_call = one_call
        self._state = _State.TEXT
        self._held = ""
        self._object = _ObjectScanner()
        self.num_calls = 0

    def push(self, text: str) -> list[Piece]:
        """What is certain with this part."""
        self._held += text
        return list(self._pieces(is_end=False))

    def finish(self) -> list[Piece]:
        """What was held back; no part follows."""
        return list(self._pieces(is_end=True))

    def _pieces(self, is_end: bool) -> Iterator[Piece]:
        while True:
            state, held = self._state, self._held
            match state:
                case _State.TEXT:
                    yield from self._read_text(is_end)
                case _State.HEAD:
                    yield from self._read_head(is_end)
                case _State.ARGUMENTS:
                    yield from self._read_arguments()
                case _State.TAIL:
                    self._read_tail()
                case _State.OVER:
                    self._held = ""
            if (self._state, self._held) == (state, held):
                return

    def _read_text(self, is_end: bool) -> Iterator[Piece]:
        text, begin, rest = self._held.partition(CALL_BEGIN)
        if begin:
            self._state, self._held = _State.HEAD, rest
            said = text.rstrip()
        elif is_end:
            self._held, said = "", text
        else:
            certain = text[: len(text) - _begun_tag(text)].rstrip()
            said, self._held = certain, text[len(certain) :]
        # Between calls, and behind the last, white space says nothing.
        if said and not (self.num_calls and not said.strip()):
            yield Content(said)

    def _read_head(self, is_end: bool) -> Iterator[Piece]:
        if head := _HEAD.match(self._held):
            self._held = self._held[head.end() :]
            self._state, self._object = _State.ARGUMENTS, _ObjectScanner()
            yield self._begin(json.loads(head[1]))
            return
        body, end, rest = self._held.partition(CALL_END)
        if end or is_end:
            self._state, self._held = _State.TEXT, rest
            yield from self._read_whole(body, end)

    def _read_whole(self, body: str, end: str) -> Iterator[Piece]:
        """A call whose parts come in another order, or text that is none."""
        call = _as_call(body)
        if call is None:
            yield Content(f"{CALL_BEGIN}{body}{end}")
            return
        name, arguments = call
        yield self._begin(name)
        yield Arguments(self.num_calls - 1, arguments)
        if self._one_call:
            self._state = _State.OVER

    def _begin(self, name: str) -> CallBegun:
        self.num_calls += 1
        return CallBegun(self.num_calls - 1, f"call_{uuid.uuid4().hex[:24]}", name)

    def _read_arguments(self) -> Iterator[Piece]:
        length = self._object.read(self._held)
        text, self._held = self._held[:length], self._held[length:]
        if text:
            yield Arguments(self.num_calls - 1, text)
        if self._object.is_complete:
            self._state = _State.OVER if self._one_call else _State.TAIL

    def _read_tail(self) -> None:
        _, end, rest = self._held.partition(CALL_END)
        if end:
            self._state, self._held = _State.TEXT, rest


class _ObjectScanner:
    """Finds where an object of JSON ends, whose text comes in parts."""

    def __init__(self) -> None:
        self._depth = 0
        self._in_string = self._escaped = False
        self.is_complete = False

    def read(self, text: str) -> int:
        """How much of the text belongs to the object."""
        for index, letter in enumerate(text):
            if self._escaped:
                self._escaped = False
            elif letter == "\\":
                self._escaped = self._in_string
            elif letter == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += (letter in "{[") - (letter in "}]")
                if self._depth == 0:
                    self.is_complete = True
                    return index + 1
        return len(text)


def _begun_tag(text: str) -> int:
    """Characters at a text's end that a call could begin with."""
    longest = min(len(CALL_BEGIN) - 1, len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(CALL_BEGIN[:n])), 0)


def _as_call(body: str) -> tuple[str, str] | None:
    """Name, and arguments as JSON, of a whole call; None where it is none."""
    try:
        call = json.loads(body)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    # Some models write the arguments as text.
    as_text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
    return call["name"], as_text
