"""Which part of the prompts is how long."""

import random
from dataclasses import dataclass, replace

from .lengths import format_length, parse_length

DEFAULT = "1K=70,8K=20,64K=8,512K-1M=2"


@dataclass(frozen=True)
class PromptClass:
    """Prompts of about the same length.

    Attributes:
        weight: its share of all prompts is this over the sum of all weights.
        lowest, highest: tokens of its prompts, both included.
    """

    weight: float
    lowest: int
    highest: int

    @property
    def name(self) -> str:
        """Its lengths, such as "1K" or "512K-1M"."""
        if self.lowest == self.highest:
            return format_length(self.lowest)
        return f"{format_length(self.lowest)}-{format_length(self.highest)}"


@dataclass(frozen=True)
class Mix:
    """Classes, the shortest first."""

    classes: tuple[PromptClass, ...]

    @classmethod
    def parse(cls, text: str) -> "Mix":
        """The mix that "1K=70,512K-1M=2" says.

        Raises:
            ValueError: it says none.
        """
        classes = [_parse_class(each) for each in text.split(",")]
        ordered = sorted(classes, key=lambda each: (each.highest, each.lowest))
        if len({each.name for each in ordered}) < len(ordered):
            raise ValueError(f"{text!r} names a class twice")
        return cls(tuple(ordered))

    def scaled(self, factor: float) -> "Mix":
        """The same with all lengths times a factor."""
        return Mix(
            tuple(
                replace(
                    each,
                    lowest=max(1, round(each.lowest * factor)),
                    highest=max(1, round(each.highest * factor)),
                )
                for each in self.classes
            )
        )

    def cut_at(self, most: int) -> "Mix":
        """The same with no prompt longer than `most` tokens.

        Raises:
            ValueError: a class has none as short as that.
        """
        for each in self.classes:
            if each.lowest > most:
                raise ValueError(
                    f"prompts of {each.name} are longer than the {most:,} tokens that the endpoint "
                    "has room for beside the answer; leave them out of --mix"
                )
        return Mix(tuple(replace(each, highest=min(each.highest, most)) for each in self.classes))

    def counts(self, requests: int) -> list[int]:
        """How many of so many requests each class has: its share, whole by largest remainders."""
        total = sum(each.weight for each in self.classes)
        exact = [requests * each.weight / total for each in self.classes]
        counts = [int(each) for each in exact]
        by_remainder = sorted(range(len(exact)), key=lambda i: counts[i] - exact[i])
        for index in by_remainder[: requests - sum(counts)]:
            counts[index] += 1
        return counts

    def draw(self, requests: int, seed: int) -> list[tuple[PromptClass, int]]:
        """Class and tokens of each request. Shares are exact, order and lengths are chance."""
        chance = random.Random(f"mix {seed}")
        drawn = [
            (each, chance.randint(each.lowest, each.highest))
            for each, count in zip(self.classes, self.counts(requests), strict=True)
            for _ in range(count)
        ]
        chance.shuffle(drawn)
        return drawn


def _parse_class(text: str) -> PromptClass:
    lengths, _, weight = text.partition("=")
    lowest, _, highest = lengths.partition("-")
    low = parse_length(lowest)
    high = parse_length(highest) if highest else low
    try:
        share = float(weight)
    except ValueError as error:
        raise ValueError(f"{text!r} names no weight; a class is 8K=20 or 512K-1M=2") from error
    if low > high or not share > 0 or share == float("inf"):
        raise ValueError(f"{text!r} is empty; a class is 8K=20 or 512K-1M=2")
    return PromptClass(share, low, high)
