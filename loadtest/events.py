"""What an event stream of OpenAI's chat endpoint says, line by line."""

import json
from dataclasses import dataclass
from typing import Any


class StreamError(Exception):
    """The endpoint said no, or broke off."""


class ErrorEventError(StreamError):
    """The stream told of an error after it had begun."""


class MalformedError(StreamError):
    """A line of the stream is not what the protocol says."""


@dataclass(frozen=True)
class Usage:
    """Tokens as the endpoint counted them."""

    prompt_tokens: int
    answer_tokens: int


@dataclass(frozen=True)
class Event:
    """One event. Most have text; the last ones have not.

    Attributes:
        text: of the answer.
        thought: what a reasoning model says before it answers: tokens as well, but no answer.
        is_end: nothing follows.
    """

    text: str = ""
    thought: str = ""
    usage: Usage | None = None
    is_end: bool = False

    @property
    def has_token(self) -> bool:
        """Whether a client has got something that the model generated."""
        return bool(self.text or self.thought)


_END = Event(is_end=True)


class LineSplitter:
    """The lines of a stream that comes in parts.

    They end with a line feed and nothing else: an answer may hold what Unicode counts as a line's
    end, as U+2028, and not every endpoint writes it as an escape. httpx's `iter_lines` cuts there.
    """

    def __init__(self) -> None:
        self._rest = b""

    def lines(self, part: bytes) -> list[str]:
        """Those that a part completes."""
        *whole, self._rest = (self._rest + part).split(b"\n")
        return [line.removesuffix(b"\r").decode() for line in whole]


def read_event(line: str) -> Event | None:
    """The event of one line; None where it has none: comments, other fields, and empty lines.

    Raises:
        ErrorEventError: it tells of an error.
        MalformedError: its data is no JSON, or another one than the protocol's.
    """
    if not line.startswith("data:"):
        return None
    data = line.removeprefix("data:").strip()
    if data == "[DONE]":
        return _END
    try:
        event = json.loads(data)
        error = event.get("error")
        made = None if error else _event(event)
    except (ValueError, AttributeError, KeyError, TypeError) as failure:
        raise MalformedError(f"{data[:200]!r}: {failure}") from failure
    if made is None:
        raise ErrorEventError(str(error.get("message") if isinstance(error, dict) else error)[:300])
    return made


def _event(event: dict[str, Any]) -> Event:
    deltas = [choice.get("delta") or {} for choice in event.get("choices") or []]
    thoughts = (each.get("reasoning_content") or each.get("reasoning") or "" for each in deltas)
    usage = event.get("usage")
    return Event(
        text="".join(each.get("content") or "" for each in deltas),
        thought="".join(thoughts),
        usage=Usage(usage["prompt_tokens"], usage["completion_tokens"]) if usage else None,
    )
