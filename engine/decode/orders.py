"""What a decoder that spans several devices has the other ranks of its mesh do.

Rank 0, the *leader*, decides everything; the others, its *followers*, carry out its orders, one
after the other, each on its own shard of the model and its own KV heads of the same pages. Steps
are collective: the leader gives the order and runs the same step. An order is a few hundred bytes
that travel from process to process while the leader fills its own inputs.
"""

import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ...kernels.pages import BlockTable
from ..messages import Tokens
from .step import PromptPiece, StepRow


class Channel(Protocol):
    """What orders travel by: an end of a connection, as `multiprocessing.connection` has them."""

    def send_bytes(self, buf: bytes, /) -> None:
        """Send one message; raises OSError where nobody is at the other end."""

    def recv_bytes(self) -> bytes:
        """Wait for the next message; raises EOFError where the other end is closed."""
        ...

    def close(self) -> None:
        """Let the other end know that nothing more comes."""


def orders_from(channel: Channel) -> Iterator[Any]:
    """What comes, until the leader has closed the channel, or is gone."""
    while True:
        try:
            message = channel.recv_bytes()
        except (EOFError, ConnectionError):
            return
        yield pickle.loads(message)


@dataclass(frozen=True)
class PieceOrder:
    """A piece of a prompt of `length` tokens: those from `start` on, and its table's number."""

    length: int
    start: int
    tokens: Tokens
    table: int


@dataclass(frozen=True)
class StepOrder:
    """Run a step. Rows are given by column, as `StepRow` has them; `tables` are numbers of theirs.

    `new_tables` are those that the last step did not have, by number: page numbers.
    """

    tokens: list[int]
    lengths: list[int]
    follows: list[int | None]
    tables: list[int]
    pieces: list[PieceOrder]
    new_tables: dict[int, npt.NDArray[np.int64]]


@dataclass(frozen=True)
class CopyOrder:
    """Copy one page in every layer."""

    source: int
    target: int


@dataclass(frozen=True)
class SetAsideOrder:
    """Copy pages to the host, under a number."""

    number: int
    pages: Sequence[int]


@dataclass(frozen=True)
class BringBackOrder:
    """Put what was set aside under a number into these pages."""

    number: int
    pages: Sequence[int]


@dataclass(frozen=True)
class ForgetOrder:
    """What was set aside under a number does not come back."""

    number: int


Order = StepOrder | CopyOrder | SetAsideOrder | BringBackOrder | ForgetOrder


class TablesToSend:
    """Numbers block tables, and sends each when it comes into a step that the last one did not
    have it in: at a million tokens one is 64 KB."""

    def __init__(self) -> None:
        self._numbers: dict[BlockTable, int] = {}  # of the last step's
        self._next = 0

    def number(
        self, tables: Iterable[BlockTable]
    ) -> tuple[list[int], dict[int, npt.NDArray[np.int64]]]:
        """The numbers of all tables of a step, in order, and the pages of those that are new."""
        before, self._numbers = self._numbers, {}
        new: dict[int, npt.NDArray[np.int64]] = {}
        numbers: list[int] = []
        for table in tables:
            number = before.get(table)
            if number is None:
                number, self._next = self._next, self._next + 1
                new[number] = table.pages
            self._numbers[table] = number
            numbers.append(number)
        return numbers, new


class TablesThatCame:
    """The other end: the last step's tables, each the same object from step to step."""

    def __init__(self) -> None:
        self._tables: dict[int, BlockTable] = {}

    def of(self, order: StepOrder) -> tuple[list[StepRow], list[PromptPiece]]:
        """What to run; only best tokens are looked for, at which nobody looks."""
        numbers = [*order.tables, *(piece.table for piece in order.pieces)]
        came = {number: BlockTable(pages) for number, pages in order.new_tables.items()}
        known = self._tables | came
        self._tables = {number: known[number] for number in numbers}
        rows = [
            StepRow(token, length, self._tables[table], takes_best=True, follows=follows)
            for token, length, follows, table in zip(
                order.tokens, order.lengths, order.follows, order.tables, strict=True
            )
        ]
        return rows, [self._piece(piece) for piece in order.pieces]

    def _piece(self, order: PieceOrder) -> PromptPiece:
        end = order.start + len(order.tokens)
        # Nobody looks at the rest of the prompt.
        prompt = np.zeros(order.length, dtype=np.int32)
        prompt[order.start : end] = order.tokens
        return PromptPiece(prompt, order.start, end, self._tables[order.table], takes_best=True)
