"""One rank of a prefill gang, as a Ray actor. Its calls are collectives: all ranks get them all,
in the same order.

A chunk is two calls: one launches it, on the thread that launches everything, and one says on
another what came out. So the next chunk can be launched before this one is computed. One that is
fetched is two other calls, and other prompts' chunks go on beside it.

Where a rank dies, the others would wait for it in a collective: `leave`, on a thread of its own,
frees them, chunks under way fail, and `meet` puts those that are left together again.
"""

import itertools
import math
import threading
import time
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import numpy.typing as npt

from ...engine.errors import (
    InvalidRequestError,
    LeftMeshError,
    OutOfMemoryError,
    TransferError,
)
from ...engine.messages import Tokens
from ..metrics import Metrics, ProcessFigures
from ..nodes import metrics_of_node, reading_here
from ..plain_errors import passes_on_plain_errors
from ..pulse import Pulse, Reading
from ..settings import GangSettings
from .scheduler import Chunk

if TYPE_CHECKING:
    import torch
    from torch.distributed import Store  # pyright: ignore[reportPrivateImportUsage]

    from ...engine.kv.background import BackgroundHandOff
    from ...engine.kv.destination import Destination
    from ...engine.kv.hand_off import HandOff, Place, Sender
    from ...engine.kv.pages import HeldPages
    from ...engine.milestones import Milestone
    from ...engine.parallel.mesh import Mesh
    from ...engine.prefill.chunk import ChunkResult

T = TypeVar("T")


@dataclass(frozen=True)
class RankResult:
    """What one rank says about a chunk that its device has computed.

    `logits`, [vocab], come from rank 0 with a prompt's last chunk, and `scores` with each chunk
    that has them. `stages` are seconds. `failure` says why pages could not be handed off, where
    that is known already.
    """

    logits: npt.NDArray[np.float32] | None
    stages: dict[str, float]
    failure: str | None
    scores: npt.NDArray[np.float32] | None = None


_LEAD_SECONDS = 0.03
"""How long before a chunk is computed the next may be dealt out: what it takes to arrive, and to
launch its first kernels. Whoever comes later than that waits for one chunk more."""


_LEAST_SECONDS = 1e-6
"""Of a layer: no clock is finer."""


@dataclass(frozen=True)
class _Launched:
    """A chunk on its way through the device; what it gives lies on the host when it is `done`."""

    result: "ChunkResult"
    logits: "torch.Tensor | None"
    scores: "torch.Tensor | None"
    done: "Milestone"
    hand_off: "HandOff"
    mesh: "Mesh"


@dataclass(frozen=True)
class _Fetching:
    """Pages on their way back; `done` when they are here, or as `hand_off.failure` says."""

    hand_off: "BackgroundHandOff"
    done: "Future[None]"
    began: float


@dataclass(frozen=True)
class Meeting:
    """Where ranks meet, host and port, and how many sequence ranks that are."""

    address: tuple[str, int]
    sequence_parallel: int

    @classmethod
    def of_one(cls) -> "Meeting":
        """Of a rank that has nobody to meet."""
        return cls(("", 0), 1)


@passes_on_plain_errors
class PrefillRank:
    """Holds a model's shard and its pages. Made by a gang, which calls `join` before all else."""

    def __init__(self, settings: GangSettings) -> None:
        self._settings = settings
        self._hand_offs: dict[str, BackgroundHandOff] = {}
        self._launched: dict[Chunk, Future[_Launched]] = {}
        self._fetching: dict[Chunk, Future[_Fetching]] = {}
        self._lock = threading.Lock()
        self._layer_seconds = math.inf
        self._pulse = Pulse()
        self._store: Store | None = None

    def tell_figures(self, metrics_directory: Path) -> None:
        """Tell from now on what this process takes."""
        model, gang = self._settings.model.name, self._settings.prefill.name
        sink = Metrics(metrics_of_node(metrics_directory), "prefill", model, gang)
        ProcessFigures(sink).start()

    def open_meeting(self) -> tuple[str, int]:
        """Listen for the other ranks, which only the first of them does; its host and port.

        The store that listens here is the one that they meet in: a port that was chosen, closed
        and opened again later might be somebody else's by then. Every meeting has its own, and
        nobody needs it once all have met.
        """
        import ray
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        host = ray.util.get_node_ip_address()
        store = TCPStore(host, 0, is_master=True, wait_for_workers=False)
        self._store = store
        return host, store.port

    def card(self) -> tuple[str, str] | None:
        """The node and the GPU that this rank computes on; None on a CPU."""
        import ray

        if not self._settings.prefill.gpus_per_rank:
            return None
        return ray.get_runtime_context().get_node_id(), str(ray.get_gpu_ids()[0])

    def compute_type(self) -> str:
        """The type of hidden states here, as "float32"."""
        from ...engine.kv.formats import dtype_name
        from ...engine.model.compute_type import compute_dtype

        return dtype_name(compute_dtype(self._settings.model.dtype, self._device()))

    def join(self, meeting: Meeting, rank: int, ranks_on_card: int) -> int:
        """Meet the other ranks and load this rank's shard of the model.

        Args:
            rank: this one's number among those that meet.
            ranks_on_card: that compute on the same GPU, and load as well, this one among them.

        Returns:
            how many sequence ranks must be left for the gang to go on.

        Raises:
            CheckpointError: the model cannot be read.
            ConfigurationError: the mesh does not divide it, it does not fit on the GPU, or the
                transport cannot reach this rank's pages.
        """
        import torch

        from ..memory import room_for_prefill

        # Here, because one thread runs all calls that launch.
        torch.set_num_threads(self._settings.prefill.threads_per_rank)
        device = self._device()
        with reading_here(), room_for_prefill(self._settings, device, ranks_on_card) as fewest:
            self._mesh = self._joined(meeting, rank)
            self._load(device)
        return fewest

    def leave(self) -> None:
        """Give up what the ranks compute together, on a thread of its own.

        Chunks that are under way fail, as all do that come before `meet`. Pages stay.
        """
        for hand_off in list(self._hand_offs.values()):
            hand_off.before_leaving()
        self._mesh.leave()

    def meet(self, meeting: Meeting, rank: int) -> None:
        """Meet the ranks that are left, or that are there as well now, and go on with them."""
        import torch

        if self._device().type == "cuda":
            # What was launched in the mesh that was left ends, and means nothing.
            torch.cuda.synchronize()
        self._mesh = self._joined(meeting, rank)
        self._prefiller.move_to(self._mesh)

    def _joined(self, meeting: Meeting, rank: int) -> "Mesh":
        from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

        from ...engine.parallel.mesh import Mesh

        prefill = self._settings.prefill
        if meeting.sequence_parallel * prefill.tensor_parallel == 1:
            return Mesh.single()
        # Nobody but the first listens.
        store = TCPStore(*meeting.address) if rank else self._store
        assert store is not None
        return Mesh.join(
            prefill.tensor_parallel,
            meeting.sequence_parallel,
            rank,
            store,
            # NCCL refuses two ranks on one GPU.
            backend="nccl" if prefill.gpus_per_rank >= 1 else "gloo",
        )

    def _device(self) -> "torch.device":
        import torch

        return torch.device("cuda" if self._settings.prefill.gpus_per_rank else "cpu")

    def _load(self, device: "torch.device") -> None:
        import ray

        from ...engine.kv.background import hand_off_stream
        from ...engine.kv.pages import PagePool
        from ...engine.model.compute_type import compute_dtype
        from ...engine.model.load import load_model
        from ...engine.prefill.prefiller import Prefiller
        from ...engine.prefill.sparsity import SparsityConfig
        from ...kernels.page_size import pages_for
        from ..transports import make_sender

        settings, prefill = self._settings, self._settings.prefill
        files = settings.model.files
        dtype = compute_dtype(settings.model.dtype, device)
        model = load_model(files, self._mesh, dtype, device, weights=settings.model.weights)
        geometry = model.pages_kept_as(settings.model.pages_kept_as)
        pool = PagePool(geometry, pages_for(prefill.kv_cache_tokens), device)
        self._stream = hand_off_stream(device)
        self._sender: Sender = make_sender(settings.transport, pool, ray.util.get_node_ip_address())
        sparsity = SparsityConfig.from_folder(files.folder) if prefill.sparse else None
        self._prefiller: Prefiller = Prefiller(model, pool, sparsity)
        self._num_layers = model.config.num_layers
        if prefill.gpus_per_rank:
            self._warm_up(model.positions.stride)

    def _warm_up(self, stride: int | None) -> None:
        """Meet every kind of chunk, of as many rows for each rank as there will be."""
        from ...engine.prefill.warm_up import warm_up_prefill
        from ...kernels.page_size import PAGE_TOKENS, pages_for

        prefill = self._settings.prefill
        # Whoever comes later meets them without the other sequence ranks.
        ranks, every = self._mesh.sequence_parallel, prefill.sequence_parallel
        tokens = PAGE_TOKENS * -(-pages_for(prefill.chunk_tokens) * ranks // every)
        warm_up_prefill(self._prefiller, self._settings.max_prompt_tokens, tokens, stride)

    def pulse(self) -> Reading:
        """How its work goes on; see `pulse.watch`. On a thread of its own."""
        return self._pulse.read()

    def begin_chunk(
        self, chunk: Chunk, prompt: Tokens | None, destination: "Destination | None"
    ) -> None:
        """Launch a chunk, and begin to hand its pages off.

        Returns when the device has nearly computed it. Pages are handed off beside the next chunks.

        Args:
            prompt: whole, with its first chunk; None with the others.
            destination: of its pages, with the first chunk.

        Raises:
            OutOfMemoryError: this rank is as it was before the request, but others may wait for it
                in a collective.
            LeftMeshError: the ranks part, and no chunk is computed before they meet again.
        """
        launched = self._future_of(chunk, self._launched)
        try:
            if self._mesh.is_left:
                raise LeftMeshError
            launched.set_result(self._launch(chunk, prompt, destination))
        except BaseException as error:
            launched.set_exception(error)
            raise
        launched.result().result.nearly.wait()

    def finish_chunk(self, chunk: Chunk) -> RankResult:
        """What came out of a chunk, when the device has computed it; on a thread of its own.

        Raises:
            LongreachError: as its `begin_chunk`.
        """
        # A piece of work from here on: a device that hangs is found while this waits for it.
        with self._pulse.piece():
            launched = self._begun(chunk, self._launched)
            launched.done.wait()
            stages = launched.result.stages
        if launched.mesh.is_left:
            # What waited for other ranks was given up, and nobody knows what it computed.
            raise LeftMeshError
        # Next to nothing is computed of the last.
        whole_layers = max(1, self._num_layers - 1)
        self._layer_seconds = max(sum(stages.values()) / whole_layers, _LEAST_SECONDS)
        logits, scores = (
            None if each is None else each.numpy() for each in (launched.logits, launched.scores)
        )
        return RankResult(logits, stages, launched.hand_off.failure, scores)

    def begin_fetch(
        self, chunk: Chunk, prompt: Tokens | None, destination: "Destination | None"
    ) -> None:
        """Begin to fetch the pages of a chunk that is back, beside whatever is computed.

        They may be long in coming, or never come, if the decode worker that has them has died.
        Until `finish_fetch` has returned, the prompt gets no other chunk, and keeps its pages.

        Args: as of `begin_chunk`.
        """
        fetching = self._future_of(chunk, self._fetching)
        try:
            hand_off = self._hand_off_of(chunk, prompt, destination)
            done = hand_off.begin_fetch(self._pages_to_fetch(chunk))
            fetching.set_result(_Fetching(hand_off, done, time.monotonic()))
        except BaseException as error:
            fetching.set_exception(error)
            raise

    def _pages_to_fetch(self, chunk: Chunk) -> "list[tuple[Place, HeldPages]]":
        """Each place has a computed chunk's tokens at most.

        Whoever sends or takes one gathers it on its device, which has room for so many.
        """
        name, size = chunk.request_id, self._settings.prefill.chunk_tokens
        starts = range(chunk.start, chunk.end, size)
        parts = ((start, min(start + size, chunk.end)) for start in starts)
        every = [self._prefiller.pages_to_fetch(name, start, end) for start, end in parts]
        return list(itertools.chain.from_iterable(every))

    def finish_fetch(self, chunk: Chunk) -> RankResult:
        """What came of a chunk's pages, when none is under way any more; on a thread of its own.

        Raises: as its `begin_fetch`. Whether the ranks part meanwhile means nothing to it.
        """
        fetching = self._begun(chunk, self._fetching)
        fetching.done.result()
        seconds = time.monotonic() - fetching.began
        return RankResult(None, {"hand-off": seconds}, fetching.hand_off.failure)

    def _future_of(self, chunk: Chunk, futures: "dict[Chunk, Future[T]]") -> "Future[T]":
        """Whichever of a chunk's two calls comes first makes it."""
        with self._lock:
            return futures.setdefault(chunk, Future())

    def _begun(self, chunk: Chunk, futures: "dict[Chunk, Future[T]]") -> T:
        """What a chunk's first call has made, or raised; its second call takes it."""
        try:
            return self._future_of(chunk, futures).result()
        finally:
            with self._lock:
                del futures[chunk]

    def _hand_off_of(
        self, chunk: Chunk, prompt: Tokens | None, destination: "Destination | None"
    ) -> "BackgroundHandOff":
        """The prompt's; with its first chunk, pages are allocated for it and its way is opened."""
        if prompt is not None and destination is not None:
            self._admit(chunk.request_id, prompt, destination)
        return self._hand_offs[chunk.request_id]

    def _admit(self, request_id: str, prompt: Tokens, destination: "Destination") -> None:
        self._prefiller.admit(request_id, prompt)
        self._hand_offs[request_id] = self._open(destination)

    def _launch(
        self, chunk: Chunk, prompt: Tokens | None, destination: "Destination | None"
    ) -> _Launched:
        from ...engine.milestones import Milestone
        from ...kernels.transfer import begin_copy_to_host

        hand_off = self._hand_off_of(chunk, prompt, destination)
        result = self._compute(chunk, hand_off)
        logits, scores = (
            None if each is None or self._mesh.rank else begin_copy_to_host(each)
            for each in (result.logits, result.scores)
        )
        done = Milestone.after_what_is_launched(self._device())
        return _Launched(result, logits, scores, done, hand_off, self._mesh)

    def share(
        self,
        request_id: str,
        prompt: Tokens,
        destination: "Destination",
        done: int,
        takes: bool,
    ) -> None:
        """Copy pages of a prompt under way from the first row of ranks to those that came later.

        Args:
            destination: of its pages, as those who have them know it.
            done: tokens that are computed.
            takes: whether this rank came later; then it returns when the pages are there.

        Raises:
            LeftMeshError: the ranks part, and the pages may not have come.
            LongreachError: as `admit`, or for want of memory. This rank has left the mesh then: the
                others may wait for it, and must not get what it would have told them next.
        """
        if self._mesh.is_left:
            raise LeftMeshError
        try:
            # It is known here from a time that was given up half-way, perhaps.
            if takes and request_id not in self._hand_offs:
                self._admit(request_id, prompt, destination)
            self._prefiller.share(request_id, done, takes)
        except Exception as error:
            if self._mesh.is_left:
                # Whatever a collective that was given up fails with follows from that.
                raise LeftMeshError from error
            self.leave()
            raise

    def come_back(self, request_id: str, to: str, destination: "Destination", done: int) -> None:
        """Go on with a request, whose pages were left here, under another name.

        Its first tokens are handed off again, as far as they do not lie at the destination, beside
        the chunks that follow.

        Args:
            done: tokens behind which the next chunk begins.

        Raises:
            InvalidRequestError: they do not lie here, as where ranks parted before this one had
                been given them. Nothing is held of the request any more.
        """
        try:
            self._prefiller.rename(request_id, to, done)
        except InvalidRequestError:
            # Nobody releases the old name after this.
            self.release(request_id)
            raise
        self._hand_offs.pop(request_id).abandon()
        hand_off = self._hand_offs[to] = self._open(destination)
        size = self._settings.prefill.chunk_tokens
        for start in range(destination.done, done, size):
            # Chunks that have ended computed them, or `share` brought them and has returned.
            self._prefiller.push(to, start, min(start + size, done), hand_off.push_whole)

    def flush(self, request_id: str) -> str | None:
        """Return when all pages of a request have arrived, or why they did not.

        On threads of its own: the gang computes other prompts meanwhile.

        Raises:
            LeftMeshError: some were not sent, because the ranks parted before they were computed.
        """
        hand_off = self._hand_offs.get(request_id)
        if hand_off is None:
            return "the request was released"
        try:
            hand_off.flush()
        except TransferError as error:
            return str(error)
        return None

    def release(self, request_id: str) -> None:
        """Forget a request, finished or not; unknown ones are no error."""
        hand_off = self._hand_offs.pop(request_id, None)
        if hand_off is not None:
            hand_off.abandon()
        self._prefiller.release(request_id)

    def _compute(self, chunk: Chunk, hand_off: "HandOff") -> "ChunkResult":
        lead = max(1, min(math.ceil(_LEAD_SECONDS / self._layer_seconds), self._num_layers // 2))
        try:
            return self._prefiller.run_chunk(
                chunk.request_id,
                chunk.start,
                chunk.end,
                hand_off,
                layers_to_go=lead,
                score_top=chunk.score_top,
            )
        except OutOfMemoryError:
            self.release(chunk.request_id)
            raise

    def _open(self, destination: "Destination") -> "BackgroundHandOff":
        from ...engine.kv.background import BackgroundHandOff

        # In a thread, on CPUs too: a decode worker that hangs must not hold the gang up.
        # A hand-off may outlive a mesh: ranks that come later join between two chunks.
        return BackgroundHandOff(self._sender.open(destination), self._stream, lambda: self._mesh)
