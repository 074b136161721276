"""Prompts that are computed beside the steps of others: whose tokens come into the next step."""

from dataclasses import dataclass

from ...kernels.page_size import PAGE_TOKENS
from ..fairness import Turns
from .step import PromptLimits


@dataclass(frozen=True)
class Part:
    """Tokens [start, end) of one request's prompt."""

    request_id: str
    start: int
    end: int


@dataclass
class _Prompt:
    tokens: int
    choices: int
    done: int = 0


class PromptQueue:
    """Prompts under way, in the order of `Turns`: the shorter kind first, and nobody starves.

    Args:
        limits: of one step.
        patience: see `Turns`.
    """

    def __init__(self, limits: PromptLimits, patience: float) -> None:
        self._at_once, self._most = limits.at_once, limits.pieces
        self._sizes_alone = limits.sizes_alone
        self._turns = Turns(patience)
        self._prompts: dict[str, _Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._prompts

    def add(self, request_id: str, tokens: int, choices: int, done: int = 0) -> None:
        """Let a prompt wait for its turn, of which `done` tokens are computed.

        Raises:
            InvalidRequestError: one of that name is here already.
        """
        self._turns.join(request_id, tokens - done)
        self._prompts[request_id] = _Prompt(tokens, choices, done)

    def done(self, request_id: str) -> int:
        """Tokens of a prompt that are computed."""
        return self._prompts[request_id].done

    def remove(self, request_id: str) -> None:
        """Forget a prompt, finished or not; unknown ones are no error."""
        self._turns.leave(request_id)
        self._prompts.pop(request_id, None)

    def deal(self, places: int, empty: bool) -> list[Part]:
        """What the next step computes; nothing is counted as computed by it.

        Args:
            places: of the batch that are free: a prompt without one for each of its choices would
                only be computed to wait.
            empty: whether nobody has a place, so that whoever comes first never waits for more.
        """
        left, parts = self._tokens(alone=empty), []
        for name in self._turns.order():
            prompt = self._prompts[name]
            if len(parts) == self._most or (prompt.choices > places and not empty):
                break
            end = min(prompt.tokens, prompt.done + left)
            if end < prompt.tokens:
                end -= end % PAGE_TOKENS
            if end > prompt.done:
                parts.append(Part(name, prompt.done, end))
                left -= end - prompt.done
                places, empty = places - prompt.choices, False
        return parts

    def _tokens(self, alone: bool) -> int:
        """Tokens that the next step may compute: more if only one prompt is here, and no answer.

        Fewer and larger steps take less time, and nobody's next token waits for them.
        """
        if not alone or len(self._prompts) != 1:
            return self._at_once
        (prompt,) = self._prompts.values()
        left = prompt.tokens - prompt.done
        return max((size for size in self._sizes_alone if size <= left), default=self._at_once)

    def count(self, part: Part) -> bool:
        """Note that a part is computed; True, and the prompt is forgotten, if it was the last."""
        prompt = self._prompts[part.request_id]
        self._turns.serve(part.request_id, part.end - part.start)
        prompt.done = part.end
        if part.end < prompt.tokens:
            return False
        self.remove(part.request_id)
        return True
