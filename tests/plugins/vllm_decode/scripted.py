"""A core that does as vLLM does, with pages and turns, and says what a test tells it to."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from longreach.engine.kv.pages import PageMemory
from longreach.engine.messages import ChosenToken
from longreach.kernels.page_size import PAGE_TOKENS, pages_for
from longreach.plugins.vllm_decode.core import Core, Generated, NewSequence
from longreach.plugins.vllm_decode.layers import LayeredMemory

LAYERS, HEADS, SIZE = 2, 2, 8
AT_ONCE = 256
"""Tokens of prompts in one step."""


@dataclass(eq=False)
class Running:
    """A sequence that is here."""

    sequence: NewSequence
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    said: int = 0
    waits: bool = False


class ScriptedCore(Core):
    """Takes pages in a step, computes prompts in parts, and then says the next scripted token.

    Args:
        says: of a sequence, by its name and how many tokens it has said, the next one.
    """

    def __init__(self, pages: int, says: Callable[[str, int], int]) -> None:
        self._layers = [torch.zeros(pages, HEADS, 2, PAGE_TOKENS, SIZE) for _ in range(LAYERS)]
        self._memory = LayeredMemory(self._layers)
        self._total, self._says = pages, says
        self._free = list(range(pages))
        self.running: dict[str, Running] = {}
        self.added: list[NewSequence] = []
        self.aborted: list[str] = []
        self.shared: dict[str, list[int]] = {}
        self.pages_to_give = True
        self.failing: set[str] = set()

    @property
    def memory(self) -> PageMemory:
        return self._memory

    @property
    def num_pages(self) -> int:
        return self._total

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def is_settling(self) -> bool:
        return False

    @property
    def num_preemptions(self) -> int:
        return 0

    def add(self, sequence: NewSequence) -> None:
        assert sequence.name not in self.running
        self.added.append(sequence)
        self.running[sequence.name] = Running(sequence, waits=sequence.handed_off)

    def pages_of(self, name: str) -> list[int]:
        running = self.running.get(name)
        pages = [] if running is None or not running.waits else running.pages
        if running is not None and pages and running.sequence.shared:
            self.shared[name] = pages[: (len(running.sequence.prompt) - 1) // PAGE_TOKENS]
        return pages

    def num_pages_of(self, names: Sequence[str]) -> int:
        held = {page for name in names for page in self.shared.get(name, ())}
        for name in names:
            if name in self.running:
                held.update(self.running[name].pages)
        return len(held)

    def num_computed(self, name: str) -> int:
        return self.running[name].computed if name in self.running else 0

    def begin(self, name: str) -> None:
        running = self.running[name]
        assert running.waits
        running.waits, running.computed = False, len(running.sequence.prompt) - 1

    def let_go(self, name: str) -> None:
        pages = self.shared.pop(name, [])
        held = {page for each in self.running.values() for page in each.pages}
        self._free += [page for page in pages if page not in held]

    def abort(self, names: Sequence[str]) -> None:
        for name in names:
            if name in self.running:
                self.aborted.append(name)
                self._forget(name)

    def end(self, name: str) -> None:
        self.abort([name])

    def step(self) -> list[Generated]:
        out: list[Generated] = []
        for name, running in list(self.running.items()):
            tokens = len(running.sequence.prompt)
            if running.waits:
                if self.pages_to_give:
                    self._grow(running, tokens)
                continue
            if name in self.failing:
                self._forget(name)
                out.append(Generated(name, (), True, "vLLM ended it with error"))
                continue
            self._find(running)
            running.computed = min(running.computed + AT_ONCE, tokens + running.said)
            self._grow(running, max(running.computed, 1))
            if running.computed == tokens + running.said:
                out.append(self._say(running))
        return out

    def _say(self, running: Running) -> Generated:
        sequence = running.sequence
        token = self._says(sequence.name, running.said)
        if sequence.held_to is not None:
            sequence.held_to.take([token])
        running.said += 1
        ended = token in sequence.ends or running.said == sequence.sampling.max_tokens
        if ended:
            self._forget(sequence.name)
        return Generated(sequence.name, [ChosenToken(token, -0.5)], ended)

    def _find(self, running: Running) -> None:
        """Pages of the same family, as the prefix cache has them."""
        first = next((each for each in self.shared if _family(each) == running.sequence.family), "")
        if running.pages or not first:
            return
        whole = (len(running.sequence.prompt) - 1) // PAGE_TOKENS
        running.pages = self.shared[first][:whole]
        running.computed = whole * PAGE_TOKENS

    def _grow(self, running: Running, tokens: int) -> None:
        missing = pages_for(tokens) - len(running.pages)
        assert missing <= len(self._free), "it was promised that there is room"
        for _ in range(missing):
            running.pages.append(self._free.pop(0))

    def _forget(self, name: str) -> None:
        running = self.running.pop(name)
        held = {page for each in self.running.values() for page in each.pages}
        held |= {page for pages in self.shared.values() for page in pages}
        self._free += [page for page in running.pages if page not in held]


def _family(name: str) -> str:
    return name.rpartition("/")[0]


def spells(*texts: str) -> Callable[[str, int], int]:
    """Each choice says its text, byte by byte, and 256, which ends it, behind."""

    def says(name: str, number: int) -> int:
        text = texts[int(name.rpartition("/")[2]) % len(texts)].encode()
        return text[number] if number < len(text) else 256

    return says


def names(sequences: Iterable[NewSequence]) -> list[str]:
    return [each.name for each in sequences]
