"""What an answer must be like to be a good one: soon enough, steady enough, whole and right."""

from bisect import bisect_left
from dataclasses import dataclass

from .lengths import format_length, parse_length
from .record import Record, Verdict

DEFAULT_WAITS = "1K=1,8K=2,64K=10,1M=60"
DEFAULT_PER_TOKEN = 0.1


@dataclass(frozen=True)
class Slo:
    """Limits by prompt length.

    Attributes:
        lengths: ascending; a limit is for prompts up to this one, and above the one before.
        waits: seconds to the first token, for each of these lengths.
        per_token: seconds for each token after the first, in an answer's mean.
    """

    lengths: tuple[int, ...]
    waits: tuple[float, ...]
    per_token: float

    @classmethod
    def parse(cls, waits: str, per_token: float) -> "Slo":
        """From "1K=1,8K=2": up to 1,024 tokens a second, up to 8,192 two.

        Raises:
            ValueError: it says no such thing.
        """
        pairs = sorted(_parse_limit(each) for each in waits.split(","))
        if len({length for length, _ in pairs}) < len(pairs):
            raise ValueError(f"{waits!r} has two limits for one length")
        if not per_token > 0:
            raise ValueError("the limit for each token must be above 0 seconds")
        return cls(tuple(p[0] for p in pairs), tuple(p[1] for p in pairs), per_token)

    def scaled(self, factor: float) -> "Slo":
        """The same seconds for lengths times a factor."""
        lengths = tuple(max(1, round(each * factor)) for each in self.lengths)
        return Slo(lengths, self.waits, self.per_token)

    def wait(self, tokens: int) -> float:
        """Most seconds to the first token of a prompt.

        Raises:
            ValueError: there is no limit for such a length.
        """
        return self.waits[self._index(tokens)]

    def class_of(self, tokens: int) -> str:
        """What prompts with the same limit as this one are called.

        Raises:
            ValueError: there is no limit for such a length.
        """
        return f"to {format_length(self.lengths[self._index(tokens)])}"

    def is_met_by(self, record: Record) -> bool:
        """Whether an answer is a good one. A wrong one never is; an unchecked one may be."""
        if record.failure is not None or record.verdict is Verdict.WRONG:
            return False
        in_time = record.first_token is not None and record.first_token <= self.wait(
            record.ask.tokens
        )
        return in_time and (record.per_token is None or record.per_token <= self.per_token)

    def _index(self, tokens: int) -> int:
        index = bisect_left(self.lengths, tokens)
        if index == len(self.lengths):
            raise ValueError(
                f"there is no limit for prompts of {tokens:,} tokens; add one to --slo, such as "
                f"{format_length(tokens)}=120"
            )
        return index


def _parse_limit(text: str) -> tuple[int, float]:
    length, _, seconds = text.partition("=")
    try:
        wait = float(seconds)
    except ValueError as error:
        raise ValueError(f"{text!r} names no seconds; a limit is 64K=10") from error
    if not 0 < wait < float("inf"):
        raise ValueError(f"{text!r} must be above 0 seconds, and not endless")
    return parse_length(length), wait
