"""The process that holds a decode replica's pages and generates, as an asynchronous Ray actor."""

import asyncio
import logging
import time
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ...engine.errors import (
    InvalidRequestError,
    LongreachError,
    OutOfPagesError,
    TransferError,
    UnavailableError,
)
from ...engine.messages import Delta, GenerationRequest
from .. import metrics
from ..metrics import Metrics
from ..settings import Settings

if TYPE_CHECKING:
    import torch

    from ...engine.decode.decoder import Decoder, Output
    from ...engine.decode.sampler import Logits
    from ...engine.kv.shared_pages import SharedPool, SharedRun
    from ..transports.object_store import PageRun

logger = logging.getLogger(__name__)

_ENDED_REMEMBERED = 4096
_STEP_FAILED = "the decode engine failed on a step, and is being replaced; send the request again"


class DecodeWorker:
    """Wraps a Decoder. The event loop and one thread that steps take turns on it.

    Receiving pages needs no turn: it writes pages that no step looks at and that only the event
    loop gives back. Pages are copied on a thread of its own, one message after the other, which has
    done with a request before the request's pages go back.
    """

    def __init__(self, settings: Settings, metrics_directory: Path) -> None:
        # torch is loaded here and not with the module: the replica knows its worker without it.
        import ray
        import torch

        from ...engine.kv.shared_pages import SharedPageReader

        self._sink = Metrics(metrics_directory, "decode", settings.model.name)
        set_threads = partial(torch.set_num_threads, settings.decode.threads)
        self._stepper = ThreadPoolExecutor(1, "step", set_threads)
        self._copier = ThreadPoolExecutor(1, "copy", set_threads)
        set_threads()
        # What comes out of the object store is read-only, and is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._decoder = _make_decoder(settings)
        self._reader = SharedPageReader(
            ray.util.get_node_ip_address(), self._decoder.device, self._decoder.receive
        )
        # Held by whoever uses the decoder; notified when pages came back.
        self._turn = asyncio.Condition()
        self._waiting_for_pages: list[tuple[float, GenerationRequest]] = []
        self._ageing = settings.prefill.ageing
        self._outputs: dict[str, asyncio.Queue[Delta | LongreachError | None]] = {}
        # Set when a request is released. An id never comes twice, so one that ended stays ended.
        self._gone: dict[str, asyncio.Event] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED_REMEMBERED)
        self._work = asyncio.Event()
        self._loop: asyncio.Task[None] | None = None
        self._failed = False

    async def ping(self) -> None:
        """Answer, if alive and able to generate.

        Raises:
            UnavailableError: a step failed in a way that leaves the engine's state unknown.
        """
        self._check()

    async def reserve(self, request: GenerationRequest) -> None:
        """Take a request's pages, waiting until they are free.

        As in prefill, shorter requests go first, with ageing, and none passes one whose turn it is.

        Raises:
            PromptTooLongError: there will never be enough pages.
            InvalidRequestError: a request of that name is here already, or was released.
            UnavailableError: as `ping`, also while waiting.
        """
        entry = (time.monotonic(), request)
        if request.request_id in self._ended:
            raise InvalidRequestError(f"request {request.request_id} was released")
        gone = self._gone[request.request_id] = asyncio.Event()
        async with self._turn:
            self._waiting_for_pages.append(entry)
            try:
                while True:
                    self._check()
                    if gone.is_set():
                        raise InvalidRequestError(f"request {request.request_id} was released")
                    if self._next_for_pages() is entry and self._fits(request):
                        return
                    self._report()
                    await self._turn.wait()
            finally:
                self._waiting_for_pages.remove(entry)
                # Whoever is next may fit into what is left.
                self._turn.notify_all()
                self._report()

    async def receive(self, request_id: str, runs: "list[PageRun]") -> None:
        """Take pages that came to the host; answers when they lie in the decoder's, or, on a GPU,
        when the copies are ahead of every later step on the stream that both use.

        Raises:
            TransferError: the request takes no pages, or not these.
        """
        await self._take(self._put, request_id, runs)

    async def copy(self, request_id: str, pool: "SharedPool", runs: "list[SharedRun]") -> None:
        """Take pages that lie in a prefill rank's pool; answers when they have been copied.

        A rank asks for no logits before all its pages are answered for, so no step of the request
        can come before the copies.

        Raises:
            TransferError: the request takes no pages, or the pool is out of reach.
        """
        await self._take(self._reader.read, request_id, pool, runs)

    async def _take(self, take: Callable[..., int], request_id: str, *message: Any) -> None:
        """Have the thread take a message's pages; `take` says how many bytes they were."""
        if request_id not in self._gone:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled")
        loop = asyncio.get_running_loop()
        try:
            size = await loop.run_in_executor(self._copier, take, request_id, *message)
        except LongreachError:
            raise
        except Exception:
            # A device that no longer works fails every request here, and no step ever finds out.
            logger.exception("copying pages failed")
            await self._fail()
            raise
        self._sink.add(metrics.HANDOFF_BYTES, size)

    def _put(self, request_id: str, runs: "list[PageRun]") -> int:
        size = 0
        for run in runs:
            pages = run.pages
            self._decoder.receive(request_id, run.place, pages)
            size += pages.nbytes
        return size

    async def answer(
        self, request_id: str, logits: "Logits"
    ) -> AsyncGenerator[tuple[list[Delta], bool], None]:
        """Generate from a prompt whose pages have all come.

        Yields what came since the last time, and whether all choices are finished with it.

        Args:
            logits: after the prompt's last token.

        Raises:
            GenerationError: this answer cannot go on.
            UnavailableError: as `ping`, also half-way.
        """
        # Not awaited: the first token does not depend on it.
        self._copier.submit(self._reader.close, request_id)
        queue = self._outputs[request_id] = asyncio.Queue()
        async with self._turn:
            self._check()
            self._deliver(self._decoder.start(request_id, logits))
        self._loop = self._loop or asyncio.create_task(self._run())
        self._work.set()
        ended = False
        while not ended:
            events = [await queue.get()]
            while not queue.empty():
                events.append(queue.get_nowait())
            error = next((event for event in events if isinstance(event, LongreachError)), None)
            ended = None in events and error is None
            yield [event for event in events if isinstance(event, Delta)], ended
            if error is not None:
                raise error

    async def release(self, request_id: str) -> None:
        """Forget a request, finished or not, and end its answer; unknown ones are no error."""
        self._ended.append(request_id)
        gone = self._gone.pop(request_id, None)
        if gone is not None:
            gone.set()
        # No copy begins from here on. Those under way still write the request's pages, so these
        # go back when the thread, which does one thing after the other, has done with them.
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._copier, self._reader.close, request_id)
        async with self._turn:
            self._decoder.cancel(request_id)
            self._turn.notify_all()
            self._report()
        queue = self._outputs.pop(request_id, None)
        if queue is not None:
            queue.put_nowait(None)

    async def gone(self, request_id: str) -> None:
        """Return when a request is released, or at once if it is not here.

        Raises:
            UnavailableError: as `ping`, also while waiting.
        """
        event = self._gone.get(request_id)
        if event is not None:
            await event.wait()
        self._check()

    def _next_for_pages(self) -> tuple[float, GenerationRequest]:
        now = time.monotonic()
        return min(
            self._waiting_for_pages,
            key=lambda entry: len(entry[1].prompt) - self._ageing * (now - entry[0]),
        )

    def _fits(self, request: GenerationRequest) -> bool:
        """Reserve pages if they are free."""
        try:
            self._decoder.reserve(request)
        except OutOfPagesError:
            return False
        return True

    async def _run(self) -> None:
        """Step for as long as there is something to generate, then sleep until there is."""
        try:
            while True:
                await self._work.wait()
                async with self._turn:
                    await self._step()
        except Exception:
            logger.exception("the decode engine failed")
            await self._fail()

    async def _step(self) -> None:
        if not self._decoder.has_work:
            self._work.clear()
            return
        started = time.perf_counter()
        loop = asyncio.get_running_loop()
        outputs = await loop.run_in_executor(self._stepper, self._decoder.step)
        self._sink.observe(metrics.DECODE_STEP_TIME, time.perf_counter() - started)
        self._deliver(outputs)
        self._turn.notify_all()
        self._report()

    def _deliver(self, outputs: "list[Output]") -> None:
        for request_id, output in outputs:
            self._outputs[request_id].put_nowait(output)
        for request_id in {request_id for request_id, _ in outputs}:
            if not self._decoder.is_generating(request_id):
                self._outputs[request_id].put_nowait(None)

    def _check(self) -> None:
        if self._failed:
            raise UnavailableError(_STEP_FAILED)

    async def _fail(self) -> None:
        """Refuse whatever comes from now on, and end whatever waits, wherever it does."""
        self._failed = True
        for queue in self._outputs.values():
            queue.put_nowait(UnavailableError(_STEP_FAILED))
        for gone in self._gone.values():
            gone.set()
        async with self._turn:
            self._turn.notify_all()

    def _report(self) -> None:
        self._sink.set(metrics.KV_CACHE_USAGE, self._decoder.usage)
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._decoder.num_requests)
        self._sink.set(metrics.NUM_REQUESTS_WAITING, len(self._waiting_for_pages))


def _make_decoder(settings: Settings) -> "Decoder":
    """Raises: as `room_for_decode`, and CheckpointError if the model cannot be read."""
    import torch

    from ..memory import room_for_decode

    device = torch.device("cuda" if settings.decode.gpus else "cpu")
    with room_for_decode(settings, device):
        return _load_decoder(settings, device)


def _load_decoder(settings: Settings, device: "torch.device") -> "Decoder":
    from ...engine.decode.decoder import Decoder
    from ...engine.decode.detokenizer import TokenBytes
    from ...engine.kv.pages import PagePool
    from ...engine.model.precision import compute_dtype
    from ...engine.model.random_weights import load_model
    from ...engine.parallel.mesh import Mesh
    from ...engine.text.tokenizer import Tokenizer
    from ...kernels.page_size import pages_for

    files = settings.model.files
    dtype = compute_dtype(settings.model.dtype, device)
    model = load_model(files, Mesh.single(), dtype, device)
    geometry = model.pages_kept_as(settings.model.pages_kept_as)
    pool = PagePool(geometry, pages_for(settings.decode.kv_cache_tokens), device)
    token_bytes = TokenBytes(Tokenizer(files.tokenizer_folder).raw)
    return Decoder(model, pool, token_bytes, settings.decode.max_batch)
