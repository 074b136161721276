"""Compiles the grammars of strangers where they can do no harm, before a decode worker does.

A grammar may take minutes or gigabytes to compile, or overflow the stack, which ends the process.
So it is compiled in a process of its own, within bounds on time, memory and stack that are tighter
than a worker's, and walked for some tokens. What passes is remembered.
"""

import asyncio
import hashlib
import resource
import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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
_MOST_RESIDENT_BYTES = 1 << 30
# Of address space, over what the process has when it is loaded.
_COMPILING_BYTES = 1 << 30
# Threads of a worker have eight times as much.
_STACK_BYTES = 1 << 20
_REHEARSED_TOKENS = 32


class GrammarCheck:
    """Checks grammars over the vocabulary of a tokenizer's folder, one after the other."""

    def __init__(self, folder: Path, seconds: float = CHECK_SECONDS) -> None:
        self._thread = ThreadPoolExecutor(1, "check-grammar")
        self._process = child.ChildProcess(__name__, folder, seconds)
        self._known: OrderedDict[bytes, str | None] = OrderedDict()

    async def check(self, grammar: str, param: str) -> None:
        """Return if answers can be held to a grammar.

        Args:
            param: the field that it comes from.

        Raises:
            RestError: they cannot.
        """
        loop = asyncio.get_running_loop()
        key = hashlib.sha256(grammar.encode("utf-8", "surrogatepass")).digest()
        if key not in self._known:
            await loop.run_in_executor(self._thread, self._learn, key, grammar)
        wrong = self._known.get(key)
        if wrong is not None:
            raise invalid(f"{param}: {wrong}", param, "invalid_value")

    def close(self) -> None:
        """End the process, when all checks are done."""
        self._thread.submit(self._process.end).result()

    def _learn(self, key: bytes, grammar: str) -> None:
        """Remember what is wrong with a grammar, if anything. In the thread."""
        if key in self._known:
            return  # whoever waited before asked about the same
        try:
            wrong = self._process.do(grammar)
        except child.ChildDiedError:
            wrong = "it takes too long or too much memory to compile; send a simpler one"
        self._known[key] = wrong
        while len(self._known) > _MOST_REMEMBERED:
            self._known.popitem(last=False)


def serve() -> None:
    """Check grammars from standard input until it is closed."""
    threading.stack_size(_STACK_BYTES)
    child.serve(_begin, _MOST_RESIDENT_BYTES)


def _begin(folder: Path) -> Callable[[str], str | None]:
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
    wrong_with = partial(_wrong_with, compiler, tokenizer.vocab_size)
    return lambda grammar: thread.submit(wrong_with, grammar).result()


def _wrong_with(compiler: GrammarCompiler, vocab_size: int, grammar: str) -> str | None:
    """What is wrong with a grammar, as far as its first tokens show it."""
    draw = np.random.default_rng(0)
    try:
        constraint = compiler.compile(grammar)
        for _ in range(_REHEARSED_TOKENS):
            if constraint.is_complete:
                break
            possible = np.flatnonzero(allowed_tokens(constraint.allowed(), vocab_size))
            constraint.take(int(draw.choice(possible)))
    except GrammarError as error:
        return str(error)
    return None


def _address_space() -> int:
    """Bytes of this process's address space in use."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()
