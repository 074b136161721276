"""A follower of a decoder that spans several devices: see `orders`.

It has its shard of the model, and its KV heads of all pages. Steps come as orders from the leader;
pages of prompts come from prefill ranks, as they come to the leader, each rank's own heads.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from ...kernels.pages import BlockTable
from ..errors import TransferError
from ..kv.arrivals import Arrivals
from ..kv.pages import PageMemory, PagePool, SetAside
from .arriving import ArrivingPages
from .orders import (
    BringBackOrder,
    Channel,
    CopyOrder,
    ForgetOrder,
    Order,
    SetAsideOrder,
    StepOrder,
    TablesThatCame,
    orders_from,
)
from .step import DecodeStep, StepUnderWay

Piece = Callable[[], AbstractContextManager[None]]
"""Around each order that is carried out."""


class FollowingRank(ABC):
    """Another rank of an engine that spans several devices: does what the leading one says."""

    @abstractmethod
    def follow(self, channel: Channel, piece: Piece = nullcontext) -> None:
        """Carry out what comes; returns when the leader has closed the channel, or is gone.

        Raises: whatever an order raises. The leader may wait for this rank in a collective then.
        """


class Follower(FollowingRank):
    """Carries orders out, on one thread.

    Args:
        pool: of this rank's heads, with as many pages as the leader's.
        step: of this rank's shard; of the same kind and sizes as the leader's.
    """

    def __init__(self, pool: PagePool, step: DecodeStep) -> None:
        self._pool, self._step = pool, step
        self._tables = TablesThatCame()
        self._aside: dict[int, SetAside] = {}
        self._under_way: StepUnderWay | None = None

    @property
    def num_aside(self) -> int:
        """How often pages are set aside on this host."""
        return len(self._aside)

    def follow(self, channel: Channel, piece: Piece = nullcontext) -> None:
        for order in orders_from(channel):
            with piece():
                self.carry_out(order)

    @torch.inference_mode()
    def carry_out(self, order: Order) -> None:
        """One order."""
        match order:
            case StepOrder():
                self._run(order)
            case CopyOrder(source, target):
                self._pool.copy_page(source, target)
            case SetAsideOrder(number, pages):
                self._aside[number] = self._pool.set_aside(pages)
            case BringBackOrder(number, pages):
                self._pool.bring_back(self._aside.pop(number), pages)
            case ForgetOrder(number):
                self._pool.forget(self._aside.pop(number))

    def _run(self, order: StepOrder) -> None:
        """Launch a step, and wait for the one before: the leader may run as far ahead."""
        before, self._under_way = self._under_way, self._step.launch(*self._tables.of(order))
        if before is not None:
            before.outcomes()


@dataclass(frozen=True, eq=False)
class _Expected:
    table: BlockTable
    arrivals: Arrivals


class FollowerPages(ArrivingPages):
    """Where pages of prompts come on a follower; which pages they are, the leader has decided.

    Args:
        pool: of this rank's heads.
        first_kv_head: of the model, the first one of them.
    """

    def __init__(self, pool: PageMemory, first_kv_head: int) -> None:
        self._pool, self._first_kv_head = pool, first_kv_head
        self._expected: dict[str, _Expected] = {}

    @property
    def pool(self) -> PageMemory:
        return self._pool

    @property
    def first_kv_head(self) -> int:
        return self._first_kv_head

    @property
    def num_expected(self) -> int:
        """Requests whose pages may come."""
        return len(self._expected)

    def expect(self, request_id: str, table: BlockTable) -> None:
        """Pages of a prompt come from now on, into these."""
        arrivals = Arrivals(self._pool.geometry, len(table.pages))
        self._expected[request_id] = _Expected(table, arrivals)

    def forget(self, request_id: str) -> None:
        """No pages of a request come any more; unknown ones are no error."""
        self._expected.pop(request_id, None)

    def arrivals_of(self, request_id: str) -> Arrivals:
        return self._expecting(request_id).arrivals

    def table_of(self, request_id: str) -> BlockTable:
        return self._expecting(request_id).table

    def _expecting(self, request_id: str) -> _Expected:
        expected = self._expected.get(request_id)
        if expected is None:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled or has all")
        return expected
