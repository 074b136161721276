"""A day of prompts, made up: people by day, a batch of long ones at night, and a rush at noon."""

import math
import random
from dataclasses import dataclass

DAY_SECONDS = 86_400
_CLASSES = ((2_000, 0.55), (20_000, 0.25), (100_000, 0.13), (400_000, 0.05), (1_000_000, 0.02))
_NIGHT_BATCH = (2 * 3600, 40)
"""When it comes, in seconds after midnight, and how many prompts of a million tokens it is."""


@dataclass(frozen=True)
class Prompt:
    """When it comes, in seconds after midnight, its tokens, and those of its answer."""

    at: float
    tokens: int
    answer_tokens: int


def day(seed: int = 1, peak_per_minute: float = 240.0) -> list[Prompt]:
    """Prompts in the order in which they come; the same seed makes the same ones."""
    chance = random.Random(seed)
    prompts = [_batch(chance, number) for number in range(_NIGHT_BATCH[1])]
    at = 0.0
    while at < DAY_SECONDS:
        at += chance.expovariate(peak_per_minute / 60)
        if chance.random() < _share_of_peak(at):
            prompts.append(_prompt(chance, at))
    return sorted(prompts, key=lambda prompt: prompt.at)


def _share_of_peak(at: float) -> float:
    """How busy people are, 0 to 1: most at three in the afternoon, and a rush at noon."""
    hour = at / 3600
    people = max(math.cos((hour - 15) / 24 * 2 * math.pi), 0.0) ** 1.5
    return min(0.05 + 0.65 * people + (0.3 if 12 <= hour < 12.5 else 0.0), 1.0)


def _prompt(chance: random.Random, at: float) -> Prompt:
    (tokens,) = chance.choices(*zip(*_CLASSES, strict=True))
    return Prompt(at, round(tokens * chance.uniform(0.6, 1.0)), chance.randint(50, 2000))


def _batch(chance: random.Random, number: int) -> Prompt:
    return Prompt(_NIGHT_BATCH[0] + number, 900_000 + chance.randint(0, 100_000), 500)
