# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""vLLM's worker of another rank than the leading one, in this process."""

import pickle
from contextlib import nullcontext
from multiprocessing import Lock
from typing import Any

from vllm.distributed.kv_transfer import get_kv_transfer_group
from vllm.platforms import current_platform
from vllm.v1.serial_utils import run_method
from vllm.v1.worker.worker_base import WorkerWrapperBase

from ...engine.decode.follower import FollowingRank, Piece
from ...engine.decode.orders import Channel, orders_from
from ...engine.errors import LostError
from ..vllm.first_runner import take_draws_back_on_cpus
from .connector import connector_of
from .layers import LayeredMemory, layers_of
from .orders import BeginOrder, CallOrder, ReadyOrder, VllmOrder
from .sums import leave_symmetric_memory_out


class VllmFollower(FollowingRank):
    """Does with its shard what the leader's worker does with its own.

    Args:
        rank: 1 or more.
    """

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._worker: Any = WorkerWrapperBase(rpc_rank=rank)
        self._config: Any = None

    def until_ready(self, channel: Channel) -> LayeredMemory:
        """Carry orders out until all blocks are allocated; these.

        Raises:
            LostError: the leader is gone before.
            OtherConnectorError, OtherPagesError, UnknownLayerError: vLLM's insides are others.
        """
        for order in orders_from(channel):
            if isinstance(order, ReadyOrder):
                working = connector_of("worker", get_kv_transfer_group())
                return LayeredMemory(list(layers_of(working.caches, self._config)))
            self._carry_out(order, channel)
        raise LostError("the leader is gone")

    def follow(self, channel: Channel, piece: Piece = nullcontext) -> None:
        for order in orders_from(channel):
            with piece():
                self._carry_out(order, channel)

    def _carry_out(self, order: VllmOrder, channel: Channel) -> None:
        match order:
            case BeginOrder():
                self._begin(order)
            case CallOrder(method, arguments, named, is_answered):
                came = run_method(self._worker, method, arguments, named)
                if is_answered:
                    channel.send_bytes(pickle.dumps(came))
            case ReadyOrder():
                # It is said once, before pages come, and `until_ready` has ended by then.
                pass

    def _begin(self, order: BeginOrder) -> None:
        """As vLLM's executor does with the leader's worker."""
        leave_symmetric_memory_out()
        self._config = order.config
        own = {
            "vllm_config": order.config,
            # Each process sees its own device alone.
            "local_rank": 0,
            "rank": self._rank,
            "distributed_init_method": order.meeting,
            "is_driver_worker": False,
            "shared_worker_lock": Lock(),
        }
        self._worker.init_worker([own] * (self._rank + 1))
        self._worker.init_device()
        self._worker.load_model()
        current_platform.update_block_size_for_backend(order.config)
        if order.config.device_config.device_type == "cpu":
            take_draws_back_on_cpus()
