"""The leader's side of a decoder that spans several devices; see `orders`.

A decoder becomes a leader by what it is given: a step and a pool that have the followers do the
same. It need not know.
"""

import itertools
import pickle
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch

from ..errors import LostError
from ..kv.pages import PageGeometry, PagePool, SetAside
from .orders import (
    BringBackOrder,
    Channel,
    CopyOrder,
    ForgetOrder,
    PieceOrder,
    SetAsideOrder,
    StepOrder,
    TablesToSend,
)
from .step import DecodeStep, PromptPiece, StepRow, StepUnderWay

_GONE = "a rank of the decode worker is gone; send the request again"


class Followers:
    """The other ranks of the leader's mesh, as it gives them orders. One call at a time."""

    def __init__(self, channels: Sequence[Channel]) -> None:
        self._channels = channels

    def tell(self, order: Any) -> None:
        """Have all of them carry an order out, after those before it; waits for nobody.

        Args:
            order: an `Order`, or what another engine's followers understand.

        Raises:
            LostError: one of them is gone.
        """
        message = pickle.dumps(order, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            for channel in self._channels:
                channel.send_bytes(message)
        except OSError as error:
            raise LostError(_GONE) from error

    def answers(self) -> list[Any]:
        """What each of them answers to the last order, if it is one that is answered.

        Raises:
            LostError: one of them is gone.
        """
        try:
            return [pickle.loads(channel.recv_bytes()) for channel in self._channels]
        except (OSError, EOFError) as error:
            raise LostError(_GONE) from error

    def close(self) -> None:
        """Let them end, after what they were told."""
        for channel in self._channels:
            channel.close()


class LeadingStep(DecodeStep):
    """A step that all ranks run, each on its shard.

    Args:
        step: of the leader's shard; the followers have one of the same kind and sizes.
    """

    def __init__(self, step: DecodeStep, followers: Followers) -> None:
        self._step, self._followers = step, followers
        self._tables = TablesToSend()
        self.runs_ahead = step.runs_ahead

    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> StepUnderWay:
        """As `DecodeStep.launch`, but it may not be launched again after a failure.

        Raises:
            LostError: it failed here, for want of memory too, and followers may wait for it in a
                collective; or one of them is gone.
        """
        self._followers.tell(self._order(rows, pieces))
        try:
            return self._step.launch(rows, pieces)
        except Exception as error:
            raise LostError(
                "a step over several ranks failed on one; send the request again"
            ) from error

    def _order(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece]) -> StepOrder:
        tables = [each.table for each in (*rows, *pieces)]
        numbers, new = self._tables.number(tables)
        own, rest = numbers[: len(rows)], numbers[len(rows) :]
        return StepOrder(
            [row.token for row in rows],
            [row.length for row in rows],
            [row.follows for row in rows],
            own,
            [
                PieceOrder(len(piece.prompt), piece.start, piece.tokens, table)
                for piece, table in zip(pieces, rest, strict=True)
            ],
            new,
        )


class LeadingPool(PagePool):
    """The leader's pages. What is done to whole pages is done to those of the followers as well,
    which have the same numbers."""

    def __init__(
        self, geometry: PageGeometry, num_pages: int, device: torch.device, followers: Followers
    ) -> None:
        super().__init__(geometry, num_pages, device)
        self._followers = followers
        self._next = itertools.count()
        self._aside: WeakKeyDictionary[SetAside, int] = WeakKeyDictionary()

    def copy_page(self, source: int, target: int) -> None:
        self._followers.tell(CopyOrder(source, target))
        super().copy_page(source, target)

    def set_aside(self, pages: Sequence[int]) -> SetAside:
        number = next(self._next)
        self._followers.tell(SetAsideOrder(number, pages))
        aside = super().set_aside(pages)
        self._aside[aside] = number
        return aside

    def bring_back(self, aside: SetAside, pages: Sequence[int]) -> None:
        self._followers.tell(BringBackOrder(self._aside.pop(aside), pages))
        super().bring_back(aside, pages)

    def forget(self, aside: SetAside) -> None:
        self._followers.tell(ForgetOrder(self._aside.pop(aside)))
        super().forget(aside)
