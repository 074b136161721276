"""The process that holds a decode replica's pages and generates, as an asynchronous Ray actor."""

import asyncio
import logging
import time
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from ...engine.errors import (
    InvalidRequestError,
    LongreachError,
    LostError,
    NotUpError,
    TransferError,
    UnavailableError,
)
from ...engine.messages import Delta, GenerationRequest, Progress
from .. import metrics
from ..leases import RENEWAL_SECONDS, LeaseBook
from ..messages import ComputedHere
from ..metrics import Metrics, ProcessFigures
from ..nodes import metrics_of_node, reading_here
from ..pulse import Pulse, Reading
from ..settings import WorkerSettings
from ..tasks import forever

if TYPE_CHECKING:
    from ...engine.decode.contract import DecodeEngine, Output
    from ...engine.decode.grammar import Constraint
    from ...engine.decode.sampler import Logits
    from ...engine.kv.hand_off import Destination

logger = logging.getLogger(__name__)

T = TypeVar("T")

_ENDED_REMEMBERED = 4096
_MESSAGE_SECONDS = 0.001
"""About what a message with tokens costs each process on its way. With many answers under way, one
a token would keep all of them busier than the device."""
_LONGEST_PAUSE = 0.1
_DRAIN_SECONDS = 20.0
_RELEASED = "the request was released; send it again"
_FAILED = "the decode engine failed, and is being replaced; send the request again"


AnswerEvent = Progress | ComputedHere | Delta
"""What a worker says about a request: Delta alone where its prompt was handed off."""

_Event = AnswerEvent | LongreachError | None
"""None behind the last."""


@dataclass(eq=False)
class _Request:
    """A request that is here, or about to be: until its release.

    `epoch` counts the gangs that were given up under it. `computed`, `done` and `before` are of a
    prompt that is computed here: when, how far, and how far an earlier attempt has come.
    """

    is_reserved: bool = False
    epoch: int = 0
    constraint: "Constraint | None" = None
    released: asyncio.Event = field(default_factory=asyncio.Event)
    events: "asyncio.Queue[_Event]" = field(default_factory=asyncio.Queue)
    computed: ComputedHere | None = None
    done: int = 0
    before: int = 0


class DecodeWorker:
    """Puts admission, copying and stepping together around one engine.

    The event loop and the thread that steps take turns on the engine. Requests come and go by
    name; an id never comes twice, so one that ended stays ended.
    """

    def __init__(self, settings: WorkerSettings, metrics_directory: Path) -> None:
        # torch is loaded here and not with the module: the replica knows its worker without it.
        import torch

        from .engines import make_engine

        # What comes out of the object store is read-only, and is only read.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        self._settings = settings
        self._set_threads = partial(torch.set_num_threads, settings.decode.threads)
        self._set_threads()
        self._sink = Metrics(metrics_of_node(metrics_directory), "decode", settings.model.name)
        ProcessFigures(self._sink).start()
        with reading_here():
            self._engine: DecodeEngine = make_engine(settings)
        self._pulse = Pulse()
        self._failed = False
        self._requests: dict[str, _Request] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED_REMEMBERED)
        self._turn = asyncio.Lock()
        self._leases = LeaseBook()
        self._releasing: set[asyncio.Task[None]] = set()
        self._preemptions = 0

    async def start(self, own_handle: Any) -> None:
        """Begin to admit, copy and step; before all else.

        Args:
            own_handle: this actor's, which ranks send pages to.
        """
        import ray

        from ..transports import make_receiver
        from .admission import Admission
        from .copier import PageCopier
        from .stepper import Stepper

        settings, engine = self._settings, self._engine
        host = ray.util.get_node_ip_address()
        self._receiver = make_receiver(settings.transport, own_handle, host, engine)
        self._copier = PageCopier(self._receiver, engine, self._pulse, self._set_threads)
        self._admission = Admission(
            engine, self._turn, settings.decode.patience, self._report, self._fail
        )
        self._stepper = Stepper(
            engine, self._turn, self._pulse, self._after_step, self._fail, self._set_threads
        )
        self._lease_ticks = forever(self._watch_leases(), self._fail)
        self._report()

    async def pulse(self) -> Reading:
        """How its work goes on; see `pulse.watch`."""
        return self._pulse.read()

    async def check(self) -> None:
        """Return if it is able to generate.

        Raises:
            LostError: the engine failed in a way that leaves its state unknown.
        """
        self._check()

    async def load(self) -> dict[str, float]:
        """What `autoscaling.DecodeLoad` is made of."""
        waiting = self._admission.num_waiting
        generating = self._engine.num_generating + self._engine.num_waiting
        return {
            "kv_usage": self._engine.usage,
            "holding": float(sum(each.is_reserved for each in self._requests.values()) - waiting),
            "waiting": float(waiting),
            "batch": generating / self._settings.decode.largest_batch,
        }

    async def reserve(self, request: GenerationRequest) -> "Destination":
        """Allocate a request's pages, waiting until they are free; where prefill sends them.

        A request that no ingress renews is released; see `leases`.

        Raises:
            PromptTooLongError: there will never be enough pages.
            GrammarError: the request's grammar cannot be compiled.
            InvalidRequestError: a request of that name is here already.
            NotUpError: the engine failed before the request came.
            LostError: it failed while the request waited.
            UnavailableError: the request was released.
        """
        here = self._take(request)
        await self._prepare(request, here)
        await self._admission.reserve(request)
        return self._receiver.destination(request.request_id, here.epoch, done=0)

    async def go_on(self, request_id: str) -> "Destination":
        """Give the gang up that computes a request's prompt; where another sends the rest of it.

        When this returns, no page of the gang that was given up comes any more, and none is being
        copied: from then on it may do with its own pages as it likes.

        Raises:
            LostError: as `check`; or copies under way do not end, because a rank hangs that they
                need, and the request cannot go on with these pages.
            UnavailableError: the request was released.
        """
        self._check()
        request = self._requests.get(request_id)
        if request is None:
            raise UnavailableError(_RELEASED)
        request.epoch += 1
        try:
            async with asyncio.timeout(_DRAIN_SECONDS):
                done = await self._copier.complete_tokens(request_id)
        except TransferError as error:  # released meanwhile
            raise UnavailableError(_RELEASED) from error
        except TimeoutError as error:
            raise LostError(
                "a rank that hangs holds pages of the request up; send it again"
            ) from error
        return self._receiver.destination(request_id, request.epoch, done)

    def _take(self, request: GenerationRequest) -> _Request:
        """Expect a request to begin, once."""
        if self._failed:
            raise NotUpError(_FAILED)
        name = request.request_id
        if name in self._ended:
            raise UnavailableError(_RELEASED)
        here = self._expect(name)
        if here.is_reserved:
            raise InvalidRequestError(f"request {name} is here already")
        here.is_reserved = True
        return here

    async def _prepare(self, request: GenerationRequest, here: _Request) -> None:
        """Compile a request's grammar, if it has one, beside everything else."""
        if request.sampling.grammar is not None:
            here.constraint = await asyncio.to_thread(self._engine.prepare, request)
            if request.request_id in self._ended:
                raise UnavailableError(_RELEASED)

    def _expect(self, request_id: str) -> _Request:
        """A request's entry, made by whichever call comes first: they overtake each other."""
        if request_id not in self._requests:
            self._requests[request_id] = _Request()
            self._leases.add(request_id)
        return self._requests[request_id]

    async def deliver(self, request_id: str, epoch: int, message: Any) -> None:
        """Take pages of a request; returns when they are in their place.

        A rank is answered for all its pages before it says that a prompt is done, so no step of
        the request can come before the copies.

        Raises:
            TransferError: the request takes no pages, or not these, or not from this gang.
        """
        self._check_epoch(request_id, epoch)
        size = await self._at_the_copier(self._copier.copy(request_id, message))
        self._sink.add(metrics.HANDOFF_BYTES, size)

    async def send_back(self, request_id: str, epoch: int, message: Any) -> Any:
        """Let a gang that goes on with a request have pages of it; what the transport answers.

        Raises:
            TransferError: as `deliver`.
        """
        self._check_epoch(request_id, epoch)
        return await self._at_the_copier(self._copier.send_back(request_id, message))

    def _check_epoch(self, request_id: str, epoch: int) -> None:
        request = self._requests.get(request_id)
        if request is None:
            raise TransferError(f"request {request_id} takes no pages; it was cancelled")
        if request.epoch != epoch:
            raise TransferError(f"request {request_id} goes on with another gang")

    async def _at_the_copier(self, work: Coroutine[Any, Any, T]) -> T:
        try:
            return await work
        except LongreachError:
            raise
        except Exception as error:
            # A device that no longer works fails every request here, and no step ever finds out.
            self._fail(error)
            raise

    async def answer(
        self, request_id: str, logits: "Logits"
    ) -> AsyncGenerator[tuple[list[Delta], bool], None]:
        """Generate from a prompt whose pages have all come.

        Yields what came since the last time, and whether all choices are finished with it.

        Args:
            logits: after the prompt's last token.

        Raises:
            GenerationError: this answer cannot go on.
            LostError: as `check`; also half-way.
            UnavailableError: the request was released; also half-way.
        """
        self._check()
        request = self._requests.get(request_id)
        if request is None:
            raise UnavailableError(_RELEASED)
        # Without waiting: other requests' copies may be in front, and the first token needs none.
        self._copier.close_soon(request_id)
        async with self._turn:
            self._check()
            self._deliver(self._engine.start(request_id, logits, request.constraint))
        self._stepper.wake()
        async for events, ended in _heard(request, self._pause):
            yield [event for event in events if isinstance(event, Delta)], ended

    async def generate(
        self, request: GenerationRequest
    ) -> AsyncGenerator[tuple[list[AnswerEvent], bool], None]:
        """Compute a prompt, once there are pages for it, and generate from it.

        Yields as `answer`; besides, Progress within the prompt, and ComputedHere at its end.

        Raises: as `reserve` and `answer`.
        """
        here = self._take(request)
        here.before = request.computed
        await self._prepare(request, here)
        await self._admission.admit(request, here.constraint)
        self._stepper.wake()
        async for message in _heard(here, self._pause):
            yield message

    def _pause(self) -> float:
        """Seconds that an answer waits with its next tokens, which then come together."""
        return min(self._engine.num_generating * _MESSAGE_SECONDS, _LONGEST_PAUSE)

    async def release(self, request_id: str) -> None:
        """Forget a request, finished or not, and end its answer; unknown ones are no error."""
        if request_id not in self._ended:
            self._ended.append(request_id)
        request = self._requests.pop(request_id, None)
        if request is None:
            return
        self._leases.remove(request_id)
        self._admission.refuse(request_id, UnavailableError(_RELEASED))
        request.released.set()
        # No copy begins from here on. Those under way still write the request's pages, so these
        # are freed when the thread, which does one thing after the other, has done with them.
        try:
            await self._copier.close(request_id)
        except Exception as error:
            self._fail(error)
        async with self._turn:
            self._engine.cancel(request_id)
        self._admission.wake()
        # Pages are free, and a request that had to make room may come back.
        self._stepper.wake()
        self._report()
        # An answer that is whole has ended already; any other must not be taken for a whole one.
        request.events.put_nowait(UnavailableError(_RELEASED))

    async def until_released(self, request_id: str) -> None:
        """Return when a request is released.

        Raises:
            LostError: as `check`, also while waiting.
        """
        if request_id not in self._ended:
            await self._expect(request_id).released.wait()
        self._check()

    async def renew(self, request_ids: Iterable[str]) -> None:
        """An ingress still wants these requests."""
        self._leases.renew(request_ids)

    async def _watch_leases(self) -> None:
        while True:
            await asyncio.sleep(RENEWAL_SECONDS)
            lapsed = self._leases.tick()
            self._sink.add(metrics.LEASES_LAPSED, len(lapsed))
            for request_id in lapsed:
                logger.warning("request %s is released: no ingress wants it", request_id)
            for request_id in lapsed:
                # Its last copy may take its time, and others' leases go on.
                releasing = asyncio.create_task(self.release(request_id))
                self._releasing.add(releasing)
                releasing.add_done_callback(self._releasing.discard)

    def _after_step(self, outputs: "list[Output]", seconds: float) -> None:
        self._sink.observe(metrics.DECODE_STEP_TIME, seconds)
        now = time.time()
        for request_id, output in outputs:
            if isinstance(output, Progress):
                self._count_prompt(request_id, output, now - seconds, now)
        self._deliver(outputs)
        if self._admission.num_waiting:
            # Whoever had to make room may have come back, and others wait for that.
            self._admission.wake()
        self._report()

    def _count_prompt(
        self, request_id: str, progress: Progress, began: float, ended: float
    ) -> None:
        """Time a step that computed a part of a prompt; after the last, say how long all took."""
        request = self._requests.get(request_id)
        if request is None:
            return
        self._sink.add(metrics.PREFILL_TOKENS, progress.done - request.done)
        again = max(min(progress.done, request.before) - request.done, 0)
        self._sink.add(metrics.PREFILL_TOKENS_AGAIN, again)
        request.done = progress.done
        before = request.computed or ComputedHere(began, began, 0.0)
        seconds = before.seconds + ended - began
        request.computed = ComputedHere(before.began, ended, seconds)
        is_whole = progress.done == progress.total
        request.events.put_nowait(request.computed if is_whole else progress)

    def _deliver(self, outputs: "list[Output]") -> None:
        """Hand out what came out, and let others have the pages of those that ended."""
        pages_were_freed = False
        for request_id, output in outputs:
            if isinstance(output, Progress):
                continue
            pages_were_freed |= not isinstance(output, Delta) or output.finish_reason is not None
            if (request := self._requests.get(request_id)) is not None:
                request.events.put_nowait(output)
        for request_id in {request_id for request_id, _ in outputs}:
            request = self._requests.get(request_id)
            if request is not None and not self._engine.is_generating(request_id):
                request.events.put_nowait(None)
        if pages_were_freed:
            self._admission.wake()

    def _check(self) -> None:
        if self._failed:
            raise LostError(_FAILED)

    def _fail(self, error: BaseException) -> None:
        """Refuse whatever comes from now on, and end whatever waits, wherever it does."""
        if self._failed:
            return
        logger.error("the decode engine failed", exc_info=error)
        self._failed = True
        self._admission.refuse_all(LostError(_FAILED))
        for request in self._requests.values():
            request.events.put_nowait(LostError(_FAILED))
            request.released.set()

    def _report(self) -> None:
        self._sink.set(metrics.KV_CACHE_USAGE, self._engine.usage)
        self._sink.set(metrics.NUM_REQUESTS_RUNNING, self._engine.num_generating)
        self._sink.set(metrics.NUM_REQUESTS_WAITING, self._admission.num_waiting)
        self._sink.set(metrics.NUM_SEQUENCES_WAITING, self._engine.num_waiting)
        self._sink.set(metrics.NUM_PROMPTS, self._engine.num_prompts)
        preemptions = self._engine.num_preemptions
        self._sink.add(metrics.PREEMPTIONS, preemptions - self._preemptions)
        self._preemptions = preemptions


async def _heard(
    request: _Request, pause: Callable[[], float]
) -> AsyncGenerator[tuple[list[AnswerEvent], bool], None]:
    """What comes for a request, and whether all choices are finished with it.

    Args:
        pause: how long to say nothing after a message with tokens.

    Raises: what comes instead of the rest.
    """
    ended = False
    while not ended:
        events = [await request.events.get()]
        while not request.events.empty():
            events.append(request.events.get_nowait())
        error = next((event for event in events if isinstance(event, LongreachError)), None)
        ended = None in events and error is None
        yield [e for e in events if e is not None and not isinstance(e, LongreachError)], ended
        if error is not None:
            raise error
        if not ended and any(isinstance(event, Delta) for event in events):
            await asyncio.sleep(pause())
