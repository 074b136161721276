"""Where one request's pages go: passed on by processes that hold no pages, and load no torch."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Destination:
    """Where one request's pages go. Picklable; what else it holds is its transport's own.

    `done` tokens of the prompt, or more, lie there already: whole pages, of all layers and heads.
    """

    request_id: str
    done: int


@dataclass(frozen=True)
class Part:
    """Where the pages of some KV heads of the model go."""

    kv_heads: range
    destination: Destination


@dataclass(frozen=True)
class PartedDestination(Destination):
    """Together, `parts` have every KV head once. `done` is what all of them have."""

    parts: tuple[Part, ...]
