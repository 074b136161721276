"""Requests as a file of Mooncake's form has them: a line of JSON each.

    {"timestamp": 3000, "input_length": 6955, "output_length": 52, "hash_ids": [46, 47, 48]}

Timestamps are milliseconds, lengths tokens. Each id stands for 512 tokens of the prompt, the last
one for what is left: prompts whose first ids are equal begin with the same text, so that an
endpoint that keeps prefixes can show what that gains.
"""

import random
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..prompts import TextSize, sentences

BLOCK_TOKENS = 512
_OWN_TOKENS = 128
"""At the end of a prompt, for key and question, which belong to no block."""


class TraceLine(BaseModel):
    """One request."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    timestamp: float = Field(ge=0, allow_inf_nan=False)
    input_length: int = Field(ge=1)
    output_length: int = Field(ge=1)
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path) -> list[TraceLine]:
    """All requests of a file, by their timestamps.

    Raises:
        ValueError: a line is no such request, or there is none.
    """
    lines: list[TraceLine] = []
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not text.strip():
            continue
        try:
            lines.append(TraceLine.model_validate_json(text))
        except ValidationError as error:
            [first, *_] = error.errors()
            where = ".".join(map(str, first["loc"]))
            raise ValueError(
                f"{path}, line {number}: {where or 'no JSON'}: {first['msg']}; a line has "
                "timestamp (ms), input_length, output_length and, if known, hash_ids"
            ) from error
    if not lines:
        raise ValueError(f"{path} has no requests")
    return sorted(lines, key=lambda line: line.timestamp)


def opening(blocks: tuple[int, ...], tokens: int, size: TextSize, seed: int) -> str:
    """What a prompt begins with: the text of all its blocks that are whole.

    Equal ids of one seed are equal text. The last `_OWN_TOKENS` are left free.
    """
    whole = max(0, tokens - round(size.template_tokens) - _OWN_TOKENS) // BLOCK_TOKENS
    return "".join(_block(each, size.characters_per_token, seed) for each in blocks[:whole])


def _block(identifier: int, characters_per_token: float, seed: int) -> str:
    characters = round(BLOCK_TOKENS * characters_per_token)
    chance = random.Random(f"{seed} {identifier}")
    return "".join(sentences(chance, characters))[:characters]
