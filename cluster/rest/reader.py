"""From the bytes of a request to what is done about it, away from the event loop.

Small bodies are read in threads. Python's parsers hold the interpreter's lock for as long as they
run, so a large body would stop every stream of its ingress: it is read in a process of its own,
one after the other. That process gives its memory back by ending.
"""

import asyncio
import json
import logging
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ...engine.errors import UnavailableError
from ...engine.messages import Tokens
from ...engine.text.tokenizer import Tokenizer
from . import child
from .errors import RestError, invalid
from .grammar_check import GrammarCheck
from .limits import IngressLimits
from .plan import Plan, Planner
from .responses import ResponsesBody, in_its_words
from .schemas import ChatBody, CompletionBody, DetokenizeBody, TokenizeBody, checked, parse

logger = logging.getLogger(__name__)

LARGE_BYTES = 1 << 18
"""Bodies of more bytes are read in the other process."""

_SMALL_AT_ONCE = 2
_READ_SECONDS = 60
# By how much the process may have grown before it is replaced by a fresh one; a million tokens of
# text take 0.12 GB. What a tokenizer takes is no growth: with a large one every body would be the
# last of its process.
_MOST_GROWTH_BYTES = 384 << 20
# Values beside prompts and messages: sampling parameters, biases, stop strings.
_OTHER_VALUES = 1 << 14
# A text may be counted that is longer than what is served, but not any number of times.
_COUNTED_LENGTHS = 2

Kind = Literal["chat", "completion", "responses", "tokenize", "detokenize"]
_BLOCK_BYTES = 1 << 18
# Of a large body, so much is looked at before all of it, and so many times as much each time after.
_FIRST_BYTES = 1 << 20
_GROWTH = 4
# By how many bytes an escape may be longer than what it stands for: backslash, u and four digits.
_MOST_FOR_A_BYTE = 5
# What stands before a prompt, or the first of several.
_KEY_OF_A_PROMPT = re.compile(rb'"(prompt|content|text|input)"\s*:\s*\[?\s*"$')
_KEY_BYTES = 64
_LISTS: dict[Kind, str] = {
    "chat": "messages",
    "completion": "prompt",
    "responses": "input",
    "tokenize": "messages",
    "detokenize": "tokens",
}
_GENERATING: tuple[Kind, ...] = ("chat", "completion", "responses")


class Reader:
    """Reads bodies. Its methods compute for long, and hold Python's lock for much of it.

    Raises (every method):
        RestError: with what is wrong, the field it is wrong in, and the remedy.
    """

    def __init__(self, limits: IngressLimits, tokenizer: Tokenizer) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._planner = Planner(limits, tokenizer)
        longest = limits.max_model_len
        self._most_messages = max(longest // tokenizer.least_tokens_per_message, 1)
        # A message has a role and a content, which may have parts with a type and a text each.
        self._most_values: dict[Kind, int] = {
            "chat": 4 * longest,
            "completion": limits.max_choices * longest + limits.max_prompts,
            "responses": 8 * longest,
            "tokenize": 4 * longest,
            "detokenize": longest,
        }

    def chat(self, body: bytes, request_id: str, arrived: float) -> Plan:
        """The plan of a chat completion."""
        self._check_count("chat", body)
        return self._planner.chat(parse(ChatBody, body, self._most_messages), request_id, arrived)

    def completion(self, body: bytes, request_id: str, arrived: float) -> Plan:
        """The plan of a completion."""
        self._check_count("completion", body)
        return self._planner.completion(parse(CompletionBody, body), request_id, arrived)

    def responses(self, body: bytes, request_id: str, arrived: float) -> Plan:
        """The plan of a response: that of the chat that it stands for."""
        self._check_count("responses", body)
        asked = parse(ResponsesBody, body)
        # The chat is told of them only where they are part of the answer.
        self._planner.check_logprobs("top_logprobs", asked.top_logprobs)
        try:
            plan = self._planner.chat(checked(ChatBody, asked.as_chat), request_id, arrived)
        except RestError as error:
            error.param = in_its_words(error.param)
            raise
        answer_id = plan.answer_id.replace("chatcmpl-", "resp_", 1)
        held_by = in_its_words(plan.held_by)
        return replace(plan, answer_id=answer_id, held_by=held_by, repeated=asked.repeated)

    def tokenize(self, body: bytes, request_id: str, arrived: float) -> bytes:
        """The answer to `/tokenize`, as JSON."""
        self._check_count("tokenize", body)
        asked = parse(TokenizeBody, body, self._most_messages)
        self._planner.check_model(asked.model)
        most = _COUNTED_LENGTHS * self._limits.max_model_len
        if asked.messages is None:
            tokens = self._planner.encode(asked.prompt or "", "prompt", most)
        else:
            tokens = self._planner.encode_chat(asked.messages, asked.writing, most)
        answer = {
            "count": len(tokens),
            "max_model_len": self._limits.max_model_len,
            "tokens": tokens.tolist(),
            "token_strs": self._names(tokens) if asked.return_token_strs else None,
        }
        return json.dumps(answer).encode()

    def _names(self, tokens: Tokens) -> list[str | None]:
        """Tokens as the vocabulary spells them."""
        return [self._tokenizer.raw.id_to_token(token) for token in tokens.tolist()]

    def detokenize(self, body: bytes, request_id: str, arrived: float) -> bytes:
        """The answer to `/detokenize`, as JSON."""
        self._check_count("detokenize", body)
        asked = parse(DetokenizeBody, body)
        self._planner.check_model(asked.model)
        tokens = self._planner.encode(asked.tokens, "tokens", self._limits.max_model_len)
        return json.dumps({"prompt": self._tokenizer.decode(tokens)}, ensure_ascii=False).encode()

    def check_texts(self, kind: Kind, body: bytes) -> None:
        """Refuse a body with a text that cannot be served, before it is parsed.

        What it lets pass may be too long all the same.
        """
        if kind not in _GENERATING:
            return
        size = _FIRST_BYTES
        while True:
            least = self._tokenizer.least_tokens_of_bytes(longest_text(body[:size]))
            if least > self._limits.max_model_len:
                raise invalid(
                    f"this model's maximum context length is {self._limits.max_model_len} tokens "
                    f"(limits.max_model_len), but a text of the body has at least {least}; "
                    "shorten it",
                    _LISTS[kind],
                    "context_length_exceeded",
                )
            if size >= len(body):
                return
            size *= _GROWTH

    def _check_count(self, kind: Kind, body: bytes) -> None:
        """Refuse a body with more values than could be served, before any is parsed."""
        most = self._most_values[kind] + _OTHER_VALUES
        if _has_more_values(body, most):
            raise invalid(
                f"{_LISTS[kind]}: the body lists more than {most} values, and this model's maximum "
                f"context length is {self._limits.max_model_len} tokens (limits.max_model_len); "
                "send fewer",
                _LISTS[kind],
                "context_length_exceeded",
            )


def _has_more_values(body: bytes, most: int) -> bool:
    """Whether JSON has more than so many commas outside its strings, from its bytes alone."""
    if body.count(b",") <= most:
        return False  # nearly all bodies, text included
    unescaped = _without_quotes_in_strings(body)
    values = quotes_before = 0
    for start in range(0, len(unescaped), _BLOCK_BYTES):
        block = unescaped[start : start + _BLOCK_BYTES]
        # Before a comma outside of strings there is an even number of quotes.
        if b'"' not in block:
            values += 0 if quotes_before % 2 else block.count(b",")
        else:
            letters = np.frombuffer(block, np.uint8)
            quotes, commas = (np.flatnonzero(letters == ord(letter)) for letter in '",')
            before = np.searchsorted(quotes, commas) + quotes_before
            values += int(np.count_nonzero(before % 2 == 0))
            quotes_before += len(quotes)
        if values > most:
            return True
    return False


def _without_quotes_in_strings(body: bytes) -> bytes:
    """JSON without escaped quotes, nor escaped backslashes, which could stand before quotes."""
    if b"\\" not in body:
        return body
    return body.replace(b"\\\\", b"").replace(b'\\"', b"")


def longest_text(body: bytes) -> int:
    """The longest string of JSON, or of a beginning of it, has as many bytes at least, decoded.

    0 where there is none, or where its key is not one of a prompt's.
    """
    # Each of what is taken out stands for a byte, and every other escape for one or more.
    unescaped = _without_quotes_in_strings(body)
    quotes = np.flatnonzero(np.frombuffer(unescaped, np.uint8) == ord('"'))
    begins, ends = quotes[::2] + 1, quotes[1::2]
    if not len(begins):
        return 0
    if len(ends) < len(begins):  # the last one goes on
        ends = np.append(ends, len(unescaped))
    longest = int(np.argmax(ends - begins))
    begin = int(begins[longest])
    if not _KEY_OF_A_PROMPT.search(unescaped[max(begin - _KEY_BYTES, 0) : begin]):
        return 0
    text = unescaped[begin : ends[longest]]
    return max(len(text) - _MOST_FOR_A_BYTE * text.count(b"\\"), 0)


class Readers:
    """Reads bodies off the event loop: few at a time, and large ones in another process."""

    def __init__(self, limits: IngressLimits, tokenizer: Tokenizer) -> None:
        self._reader = Reader(limits, tokenizer)
        self._small = ThreadPoolExecutor(_SMALL_AT_ONCE, "read-small")
        self._large = ThreadPoolExecutor(1, "read-large")
        setup = (limits, tokenizer.folder)
        self._process = child.ChildProcess(__name__, setup, _READ_SECONDS)
        self._grammars = GrammarCheck(tokenizer.folder)

    async def read(self, kind: Kind, parts: list[bytes], request_id: str, arrived: float) -> Any:
        """What the method of `Reader` of that name makes of a body.

        Raises:
            RestError: as that method does.
            UnavailableError: the body took too long to read, or too much memory.
        """
        done = await self._read(kind, parts, request_id, arrived)
        if isinstance(done, Plan) and done.grammar is not None:
            lark = await self._grammars.check(done.grammar, done.held_by or "")
            return done if lark == done.grammar else done.held_to(lark)
        return done

    async def _read(self, kind: Kind, parts: list[bytes], request_id: str, arrived: float) -> Any:
        loop = asyncio.get_running_loop()
        if sum(map(len, parts)) > LARGE_BYTES:
            await loop.run_in_executor(self._small, self._check_large, kind, parts)
            job = (kind, parts, request_id, arrived)
            return await loop.run_in_executor(self._large, self._read_large, *job)
        read = getattr(self._reader, kind)
        return await loop.run_in_executor(self._small, read, b"".join(parts), request_id, arrived)

    def _check_large(self, kind: Kind, parts: list[bytes]) -> None:
        self._reader.check_texts(kind, b"".join(parts))

    def _read_large(self, kind: Kind, parts: list[bytes], request_id: str, arrived: float) -> Any:
        try:
            return self._process.do(kind, parts, request_id, arrived)
        except child.ChildDiedError as error:
            logger.error("request %s: the process that read its body died", request_id)
            raise UnavailableError(
                "the body could not be read: it took too long or too much memory"
            ) from error

    def warm_up(self) -> None:
        """Start the other process, if it is not up, without waiting for it."""
        self._large.submit(self._process.start)


def serve() -> None:
    """Read bodies from standard input until it is closed."""
    child.serve(_begin, _MOST_GROWTH_BYTES)


def _begin(setup: tuple[IngressLimits, Path]) -> child.Work:
    limits, folder = setup
    reader = Reader(limits, Tokenizer(folder))

    def read(kind: Kind, parts: list[bytes], request_id: str, arrived: float) -> Any:
        return getattr(reader, kind)(b"".join(parts), request_id, arrived)

    return read
