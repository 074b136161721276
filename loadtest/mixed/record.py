"""One request, before it is sent and when it has ended."""

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True)
class Ask:
    """A request that shall be sent.

    Attributes:
        at: seconds since the start; None where it is sent as soon as another one has ended.
        kind: the name of its class.
        tokens: of the prompt, about.
        answer_tokens: most tokens of the answer.
        blocks: what the prompt begins with; equal ones are equal text (see `trace`).
    """

    number: int
    at: float | None
    kind: str
    tokens: int
    answer_tokens: int
    blocks: tuple[int, ...] = ()


class Verdict(StrEnum):
    """What an answer that came whole said."""

    RIGHT = "right"
    WRONG = "wrong"
    UNCHECKED = "unchecked"


class FailureKind(StrEnum):
    """How an answer can fail to come whole."""

    CONNECT = "no connection"
    STATUS = "status"
    EVENT = "error in the stream"
    CUT = "stream cut off"
    MALFORMED = "malformed stream"
    EMPTY = "no text"
    TIMEOUT = "timeout"
    STOPPED = "given up"


@dataclass(frozen=True)
class Failure:
    """Why an answer did not come whole; `said` is for people."""

    kind: FailureKind
    said: str
    status: int | None = None

    @property
    def name(self) -> str:
        """What such failures are counted by: "status 503", "timeout"."""
        return self.kind.value if self.status is None else f"{self.kind.value} {self.status}"


@dataclass(frozen=True)
class Record:
    """How one request went, as its client saw it. Seconds count from when it was sent.

    Attributes:
        sent: seconds since the start.
        late: seconds that it was sent after it should have been: the load test's own delay.
        first_token: until the first text; None where none came.
        gaps: seconds between one text and the next.
        ended: until the end, whichever that was.
        prompt_tokens, answer_tokens: as the endpoint counted; None where it did not say.
        verdict: None where it failed.
    """

    ask: Ask
    sent: float
    late: float
    first_token: float | None
    gaps: tuple[float, ...]
    ended: float
    prompt_tokens: int | None
    answer_tokens: int | None
    verdict: Verdict | None
    failure: Failure | None

    @property
    def per_token(self) -> float | None:
        """Mean seconds for each token after the first; None for answers of one.

        Where the endpoint does not count tokens, each text counts as one.
        """
        tokens = self.answer_tokens or len(self.gaps) + 1
        return sum(self.gaps) / (tokens - 1) if tokens > 1 and self.gaps else None
