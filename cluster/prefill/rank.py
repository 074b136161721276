"""One rank of a prefill gang, as a Ray actor. Its calls are collectives: all ranks get them all,
in the same order.
"""

import socket
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ...engine.errors import OutOfMemoryError, TransferError
from ...engine.messages import Tokens
from ..settings import GangSettings
from .scheduler import Chunk

if TYPE_CHECKING:
    import torch

    from ...engine.kv.hand_off import PageSender
    from ...engine.kv.pages import PagePool
    from ...engine.kv.shared_pages import SharedPool
    from ...engine.parallel.mesh import Mesh
    from ...engine.prefill.prefiller import ChunkResult


@dataclass(frozen=True)
class RankResult:
    """What one rank says about a chunk it computed.

    `logits`, [vocab], come from rank 0 with a prompt's last chunk. `hand_off` are the seconds
    spent after it until all pages had arrived. `failure` says why pages could not be handed off.
    """

    logits: npt.NDArray[np.float32] | None
    stages: dict[str, float]
    hand_off: float
    failure: str | None


class PrefillRank:
    """Holds a model's shard and its pages. Made by a gang, which calls `join` before all else."""

    def __init__(self, settings: GangSettings, rank: int) -> None:
        # torch is loaded here and not with the module: coordinators know ranks without it.
        import torch

        torch.set_num_threads(settings.prefill.threads_per_rank)
        self._settings = settings
        self._rank = rank
        self._senders: dict[str, PageSender] = {}

    def free_address(self) -> str:
        """Where rank 0 can be met by the others."""
        import ray

        host = ray.util.get_node_ip_address()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return f"tcp://{host}:{probe.getsockname()[1]}"

    def card(self) -> tuple[str, str] | None:
        """The node and the GPU that this rank computes on; None on a CPU."""
        import ray

        if not self._settings.prefill.gpus_per_rank:
            return None
        return ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0])

    def compute_type(self) -> str:
        """The type of hidden states here, as "float32"."""
        from ...engine.model.precision import compute_dtype

        dtype = compute_dtype(self._settings.model.dtype, self._device())
        return str(dtype).removeprefix("torch.")

    def join(self, init_method: str, ranks_on_card: int) -> None:
        """Meet the other ranks and load this rank's share of the model.

        Args:
            ranks_on_card: that compute on the same GPU, this one among them.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigurationError: the mesh does not divide it, it does not fit on the GPU, or the
                transport cannot reach this rank's pages.
        """
        from ...engine.parallel.mesh import Mesh
        from ..memory import room_for_prefill

        prefill, device = self._settings.prefill, self._device()
        with room_for_prefill(self._settings, device, ranks_on_card):
            mesh = Mesh.join(
                prefill.tensor_parallel,
                prefill.sequence_parallel,
                self._rank,
                init_method,
                # NCCL refuses two ranks on one GPU.
                backend="nccl" if prefill.gpus_per_rank >= 1 else "gloo",
            )
            self._load(mesh, device)

    def _device(self) -> "torch.device":
        import torch

        return torch.device("cuda" if self._settings.prefill.gpus_per_rank else "cpu")

    def _load(self, mesh: "Mesh", device: "torch.device") -> None:
        from ...engine.kv.background import hand_off_stream
        from ...engine.kv.pages import PagePool, pages_for
        from ...engine.model.precision import compute_dtype
        from ...engine.model.random_weights import load_model
        from ...engine.prefill.prefiller import Prefiller
        from ...engine.prefill.sparsity import SparsityConfig
        from ...engine.prefill.warm_up import warm_up_prefill

        settings, prefill = self._settings, self._settings.prefill
        files = settings.model.files
        model = load_model(files, mesh, compute_dtype(settings.model.dtype, device), device)
        geometry = model.pages_kept_as(settings.model.pages_kept_as)
        pool = PagePool(geometry, pages_for(prefill.kv_cache_tokens), device)
        self._stream = hand_off_stream(device)
        self._shared_pool = _share(pool) if settings.transport.kind == "cuda_ipc" else None
        sparsity = SparsityConfig.from_folder(files.folder) if prefill.sparse else None
        self._prefiller: Prefiller = Prefiller(model, pool, sparsity)
        if prefill.gpus_per_rank:
            longest = settings.max_prompt_tokens
            stride = model.positions.stride
            warm_up_prefill(self._prefiller, longest, prefill.chunk_tokens, stride)

    def ping(self) -> None:
        """Answer, if alive."""

    def run_chunk(self, chunk: Chunk, prompt: Tokens | None, worker: Any) -> RankResult:
        """Compute a chunk and hand its pages off.

        Args:
            prompt: whole, with its first chunk; None with the others.
            worker: the decode worker's actor handle.

        Raises:
            OutOfMemoryError: this rank is as it was before the request, but others may wait for it
                in a collective.
        """
        name = chunk.request_id
        if prompt is not None:
            self._prefiller.admit(name, prompt)
            self._senders[name] = self._make_sender(worker, name)
        sender = self._senders[name]
        result = self._compute(chunk, sender)
        computed = time.perf_counter()
        failure = sender.failure
        if chunk.is_last:
            try:
                sender.flush()
            except TransferError as error:
                failure = str(error)
            self.release(name)
        wanted = result.logits is not None and self._rank == 0
        return RankResult(
            logits=result.logits.cpu().numpy() if wanted and result.logits is not None else None,
            stages=result.stages,
            hand_off=time.perf_counter() - computed,
            failure=failure,
        )

    def _compute(self, chunk: Chunk, sender: "PageSender") -> "ChunkResult":
        try:
            return self._prefiller.run_chunk(chunk.request_id, chunk.start, chunk.end, sender)
        except OutOfMemoryError:
            self.release(chunk.request_id)
            raise

    def release(self, request_id: str) -> None:
        """Forget a request, finished or not; unknown ones are no error."""
        sender = self._senders.pop(request_id, None)
        if sender is not None:
            sender.abandon()
        self._prefiller.release(request_id)

    def _make_sender(self, worker: Any, request_id: str) -> "PageSender":
        from ...engine.kv.background import BackgroundSender
        from ..transports.cuda_ipc import CudaIpcSender
        from ..transports.object_store import ObjectStoreSender

        if self._shared_pool is not None:
            sender = CudaIpcSender(worker, request_id, self._shared_pool)
        else:
            limit = self._settings.transport.max_in_flight_bytes
            sender = ObjectStoreSender(worker, request_id, limit)
        # A CPU has computed what it pushes, and a thread would only take time from it.
        return sender if self._stream is None else BackgroundSender(sender, self._stream)


def _share(pool: "PagePool") -> "SharedPool":
    import ray

    from ...engine.kv.shared_pages import SharedPool

    return SharedPool.of(pool, ray.util.get_node_ip_address())
