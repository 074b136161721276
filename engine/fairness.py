"""Whose turn it is: the shorter kind first, with a bound on how often one is passed.

Pure bookkeeping over token counts. Time is what has been served, in tokens, so that the order is
the same on a laptop and on eight GPUs.
"""

from dataclasses import dataclass

from .errors import InvalidRequestError


@dataclass
class _Entry:
    tokens: int
    served: int = 0
    passed: int = 0
    starved: bool = False

    @property
    def remaining(self) -> int:
        return self.tokens - self.served

    @property
    def kind(self) -> int:
        return self.remaining.bit_length()


class Turns:
    """An order over prompts that share something which serves tokens: a gang, or a pool of pages.

    Prompts are of a kind whose tokens to go lie between the same powers of two. The shortest kind
    comes first, and within a kind the prompt that joined first: to let one pass for a few tokens
    less would make those that are about as long take turns at waiting, and gain nobody anything.
    Tokens served to prompts that joined later count as passing a prompt. One of n tokens starves,
    from then on and until it leaves, when it has been passed by `patience` × n of them. Of those
    that starve, the one that joined first gets its part: it comes first whenever it has been
    passed by more than `patience` × (n + what it has been served).

    So where prompts are served in pieces of c tokens at most, and always the first of the order, a
    prompt of n tokens with e earlier ones of m tokens before it is passed by at most
    `patience` × (2 × n + m) + (e + 2) × c tokens, however many others join. Without anyone
    starving, a prompt is passed by shorter kinds alone, and prompts of a kind never alternate;
    equal ones never do.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        # In the order in which they joined.
        self._entries: dict[str, _Entry] = {}

    def __len__(self) -> int:
        """How many prompts have joined and not left."""
        return len(self._entries)

    def join(self, name: str, tokens: int) -> None:
        """Put a prompt of so many tokens into the order.

        Raises:
            InvalidRequestError: one of that name is in it already.
        """
        if name in self._entries:
            raise InvalidRequestError(f"a request named {name} is here already; choose another id")
        self._entries[name] = _Entry(tokens)

    def leave(self, name: str) -> None:
        """Take a prompt out of the order, served or not; unknown ones are no error."""
        self._entries.pop(name, None)

    def serve(self, name: str, tokens: int) -> None:
        """Note that a prompt, which must be in the order, gets so many of its tokens served."""
        served = self._entries[name]
        served.served += tokens
        for entry in self._entries.values():
            if entry is served:
                return
            entry.passed += tokens
            entry.starved = entry.passed >= self._patience * entry.tokens

    def order(self) -> list[str]:
        """Prompts that have tokens to go, the one whose turn it is first."""
        waiting = [name for name, entry in self._entries.items() if entry.remaining]
        # Sorting is stable: prompts of a kind stay in the order in which they joined.
        waiting.sort(key=lambda name: self._entries[name].kind)
        starving = self._first_starving()
        if starving is not None and self._wants_its_part(self._entries[starving]):
            waiting.remove(starving)
            waiting.insert(0, starving)
        return waiting

    def _first_starving(self) -> str | None:
        names = (name for name, entry in self._entries.items() if entry.starved and entry.remaining)
        return next(names, None)

    def _wants_its_part(self, entry: _Entry) -> bool:
        return entry.passed >= self._patience * (entry.tokens + entry.served)
