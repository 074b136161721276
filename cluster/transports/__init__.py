"""How KV pages travel from prefill ranks to decode workers: one module for each transport.

Those are `object_store`, `cuda_ipc` and `nixl`; `actor_messages` has what all share, `announced`
what the two share that read another process's memory, and `shared_pages` how it is mapped on one
host. To add one: a module with a `Sender` and a `Receiver`; its
name in `settings.TransportSettings`, where `gathers_pages` must hold for it too; and a line in each
of the two functions here that choose.
"""

from typing import Any

from ...engine.kv.hand_off import Receiver, RequestPages, Sender
from ...engine.kv.pages import PageMemory
from ...engine.kv.parted import PartedSender
from ..settings import TransportSettings
from .cuda_ipc import CudaIpcReceiver, CudaIpcSender
from .nixl import NixlAgent, NixlReceiver, NixlSender
from .object_store import ObjectStoreReceiver, ObjectStoreSender
from .shared_pages import SharedPool


def make_sender(settings: TransportSettings, pool: PageMemory, host: str) -> Sender:
    """A rank's end; `host` is where the pool's memory is.

    Raises:
        ConfigurationError: the transport cannot reach this pool.
    """
    return PartedSender(_make_sender(settings, pool, host))


def _make_sender(settings: TransportSettings, pool: PageMemory, host: str) -> Sender:
    match settings.kind:
        case "object_store":
            return ObjectStoreSender(settings.max_in_flight_bytes)
        case "cuda_ipc":
            return CudaIpcSender(SharedPool.of(pool, host))
        case "nixl":
            return NixlSender(NixlAgent(pool))


def make_receiver(
    settings: TransportSettings, worker: Any, host: str, pages: RequestPages
) -> Receiver:
    """A decode worker's end.

    Args:
        worker: the handle of its actor.
        pages: of its engine.

    Raises:
        ConfigurationError: the transport cannot reach them.
    """
    match settings.kind:
        case "object_store":
            return ObjectStoreReceiver(worker, pages)
        case "cuda_ipc":
            return CudaIpcReceiver(worker, host, pages)
        case "nixl":
            return NixlReceiver(worker, NixlAgent(pages.pool), pages)
