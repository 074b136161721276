"""Compiles the grammars of strangers where they can do no harm, before a decode worker does.

A grammar may take minutes or gigabytes to compile, or overflow the stack, which ends the process.
So it is compiled in a process of its own, within bounds on time, memory and stack that are tighter
than a worker's, and walked for some tokens. What passes is remembered. GBNF, llama.cpp's dialect,
is put into Lark there as well, because that may take minutes too.
"""

import asyncio
import hashlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ...engine.decode.detokenizer import TokenBytes
from ...engine.decode.grammar import GrammarCompiler, allowed_tokens
from ...engine.errors import GrammarError
from ...engine.text.tokenizer import Tokenizer
from . import child
from .errors import invalid

CHECK_SECONDS = 10.0
"""That one grammar may take."""

_MOST_REMEMBERED = 1024
_MOST_GROWTH_BYTES = 768 << 20
# Of address space, over what the process has when it is loaded.
_COMPILING_BYTES = 1 << 30
# Threads of a worker have eight times as much.
_STACK_BYTES = 1 << 20
_REHEARSED_TOKENS = 32
# Longer texts than this are put into Lark again each time.
_LONGEST_REMEMBERED = 1 << 14


@dataclass(frozen=True)
class Verdict:
    """What came of a grammar: the same in Lark where it was not, or what is wrong with it."""

    lark: str | None = None
    wrong: str | None = None


class GrammarCheck:
    """Checks grammars over the vocabulary of a tokenizer's folder, one after the other."""

    def __init__(self, folder: Path, seconds: float = CHECK_SECONDS) -> None:
        self._thread = ThreadPoolExecutor(1, "check-grammar")
        self._process = child.ChildProcess(__name__, folder, seconds)
        self._known: OrderedDict[bytes, Verdict] = OrderedDict()

    async def check(self, grammar: str, param: str) -> str:
        """A grammar in Lark, if answers can be held to it.

        Args:
            grammar: in Lark or GBNF.
            param: the field that it comes from.

        Raises:
            RestError: they cannot.
        """
        loop = asyncio.get_running_loop()
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        verdict = self._known.get(key)
        if verdict is None:
            verdict = await loop.run_in_executor(self._thread, self._learn, key, grammar)
        if verdict.wrong is not None:
            raise invalid(f"{param}: {verdict.wrong}", param, "invalid_value")
        return grammar if verdict.lark is None else verdict.lark

    def close(self) -> None:
        """End the process, when all checks are done."""
        self._thread.submit(self._process.end).result()

    def _learn(self, key: bytes, grammar: str) -> Verdict:
        """Find out about a grammar, and remember it. In the thread."""
        if key in self._known:
            return self._known[key]  # whoever waited before asked about the same
        try:
            verdict = self._process.do(grammar)
        except child.ChildDiedError:
            wrong = "it takes too long or too much memory to compile; send a simpler one"
            verdict = Verdict(wrong=wrong)
        if len(verdict.lark or "") <= _LONGEST_REMEMBERED:
            self._known[key] = verdict
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)
        return verdict


def serve() -> None:
    """Check grammars from standard input until it is closed."""
    threading.stack_size(_STACK_BYTES)
    child.serve(_begin, _MOST_GROWTH_BYTES)


def _begin(folder: Path) -> Callable[[str], Verdict]:
    tokenizer = Tokenizer(folder)
    # Which tokens end an answer is known to the model; whether a grammar compiles depends on none.
    any_end = tokenizer.vocab_size - 1
    token_bytes = TokenBytes(tokenizer.raw)
    compiler = GrammarCompiler(token_bytes, tokenizer.vocab_size, (any_end,))
    compiler.compile('start: "loads the vocabulary"')
    limit = _address_space() + _COMPILING_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # On a thread, because the first one's stack is not ours to choose.
    thread = ThreadPoolExecutor(1)
    verdict_on = partial(_verdict_on, compiler, tokenizer.vocab_size)
    return lambda grammar: thread.submit(verdict_on, grammar).result()


def _verdict_on(compiler: GrammarCompiler, vocab_size: int, grammar: str) -> Verdict:
    """As far as the first tokens show it."""
    from llguidance.gbnf_to_lark import any_to_lark

    draw = np.random.default_rng(0)
    try:
        lark = any_to_lark(grammar)
    except Exception as error:  # of its own, and whatever its parser meets
        return Verdict(wrong=f"no Lark, and no GBNF: {error}")
    try:
        constraint = compiler.compile(lark)
        for _ in range(_REHEARSED_TOKENS):
            if constraint.is_complete:
                break
            possible = np.flatnonzero(allowed_tokens(constraint.allowed(), vocab_size))
            constraint.take(int(draw.choice(possible)))
    except GrammarError as error:
        return Verdict(wrong=str(error))
    return Verdict(lark=None if lark == grammar else lark)


def _address_space() -> int:
    """Bytes of this process's address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
