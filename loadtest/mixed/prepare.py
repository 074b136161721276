"""Requests made ready before the clock runs, so that making prompts delays none of them."""

import json
from dataclasses import dataclass

from ..endpoint import Endpoint
from ..prompts import SHORT_ANSWER, PromptMaker, TextSize
from .plan import Plan
from .record import Ask
from .trace import opening


@dataclass(frozen=True)
class Style:
    """How requests are asked.

    Attributes:
        check: whether the model can say what is right.
        whole: whether an answer has all its tokens, however soon the model would end.
    """

    check: bool
    whole: bool


@dataclass(frozen=True)
class Prepared:
    """The bytes of a request; `key` is what its answer must say, None where nobody checks."""

    ask: Ask
    key: str | None
    body: bytes


def prepare(
    plan: Plan, endpoint: Endpoint, size: TextSize, style: Style, seed: int
) -> list[Prepared]:
    """All requests of a plan. No two have the same text, but for what a trace says is the same.

    An answer too short for a key is not checked.
    """
    maker = PromptMaker(size, seed)
    return [_prepare(ask, maker, endpoint, style, seed) for ask in plan.asks]


def _prepare(ask: Ask, maker: PromptMaker, endpoint: Endpoint, style: Style, seed: int) -> Prepared:
    prompt = maker.make(ask.tokens, opening(ask.blocks, ask.tokens, maker.size, seed))
    body = endpoint.chat_body(prompt.text, ask.answer_tokens, style.whole)
    checked = style.check and ask.answer_tokens >= SHORT_ANSWER
    return Prepared(ask, prompt.key if checked else None, json.dumps(body).encode())
