"""The process that holds a decode replica's pages and generates, as an asynchronous Ray actor."""

import asyncio
import logging
import warnings
from collections import deque
from collections.abc import AsyncGenerator, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

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
from ..messages import AnswerOrder, ComputedHere
from ..metrics import Metrics, ProcessFigures
from ..nodes import metrics_of_node, reading_here
from ..plain_errors import passes_on_plain_errors
from ..pulse import Pulse, Reading
from ..settings import WorkerSettings
from ..streams import BEAT_SECONDS
from ..tasks import forever
from .answer_clock import AnswerClock
from .fences import check_epoch, unless_broken
from .meeting import WorkerMeeting
from .outbox import Outboxes, Said
from .stepper import Stepped, Stepper, Turn, are_over

if TYPE_CHECKING:
    from ...engine.decode.contract import DecodeEngine, Output
    from ...engine.decode.grammar import Constraint
    from ...engine.decode.sampler import Logits
    from ...engine.kv.destination import Destination

logger = logging.getLogger(__name__)

_ENDED_REMEMBERED = 4096
_DRAIN_SECONDS = 20.0
_RELEASED = "the request was released; send it again"
_FAILED = "the decode engine failed, and is being replaced; send the request again"


_Event = Progress | ComputedHere | LongreachError | None
"""What the request's life hears; None behind the last."""


@dataclass(eq=False)
class _Request:
    """A request that is here, or about to be: until its release.

    `epoch` counts the gangs that were given up under it. `computed`, `done` and `before` are of a
    prompt that is computed here: when, how far, and how far an earlier attempt has come.
    """

    is_reserved: bool = False
    epoch: int = 0
    prompt_tokens: int = 0
    arrived: float = 0.0
    constraint: "Constraint | None" = None
    released: asyncio.Event = field(default_factory=asyncio.Event)
    events: "asyncio.Queue[_Event]" = field(default_factory=asyncio.Queue)
    listener: str = ""
    clock: AnswerClock | None = None
    computed: ComputedHere | None = None
    done: int = 0
    before: int = 0

    def answer_to(self, order: AnswerOrder) -> None:
        """Whom to tell what is generated, from now on."""
        self.listener = order.listener
        self.clock = AnswerClock(order, self.prompt_tokens, self.arrived)


@passes_on_plain_errors
class DecodeWorker:
    """Puts admission, copying and stepping together around one engine.

    The event loop and the thread that steps take turns on the engine. Requests come and go by
    name; an id never comes twice, so one that ended stays ended.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        metrics_directory: Path,
        meeting: WorkerMeeting | None = None,
    ) -> None:
        """`meeting` is of its ranks where it spans several devices; this one leads."""
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
            self._engine: DecodeEngine = make_engine(settings, self._sink, meeting)
        self._pulse = Pulse()
        self._failed = False
        self._requests: dict[str, _Request] = {}
        self._ended: deque[str] = deque(maxlen=_ENDED_REMEMBERED)
        self._turn = Turn()
        self._leases = LeaseBook()
        self._releasing: set[asyncio.Task[None]] = set()
        self._outboxes = Outboxes()
        self._preemptions = 0

    async def start(self, own_handle: Any, followers: Sequence[Any] = ()) -> None:
        """Begin to admit, copy and step; before all else.

        Args:
            own_handle: this actor's, which ranks send pages to.
            followers: handles of its further ranks, which have joined or are about to.
        """
        import ray

        from ..transports import make_receiver
        from .admission import Admission
        from .copier import PageCopier
        from .further_ranks import FurtherRanks

        settings, engine = self._settings, self._engine
        host = ray.util.get_node_ip_address()
        self._receiver = make_receiver(settings.transport, own_handle, host, engine)
        self._copier = PageCopier(self._receiver, engine, self._pulse, self._set_threads)
        self._further_ranks = FurtherRanks(followers, engine)
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
        name = request.request_id
        await self._admission.reserve(request)
        # Some engines say with their next step which pages they are.
        self._stepper.wake()
        if self._requests.get(name) is not here:
            # Its pages are about to be freed.
            raise UnavailableError(_RELEASED)
        await self._further_ranks.expect(name, len(request.prompt))
        return self._destination(name, here.epoch, done=0)

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
                others = await self._further_ranks.go_on(request_id, request.epoch)
                done = min([await self._copier.complete_tokens(request_id), *others])
        except TransferError as error:  # released meanwhile
            raise UnavailableError(_RELEASED) from error
        except TimeoutError as error:
            raise LostError(
                "a rank that hangs holds pages of the request up; send it again"
            ) from error
        return self._destination(request_id, request.epoch, done)

    def _destination(self, request_id: str, epoch: int, done: int) -> "Destination":
        own = self._receiver.destination(request_id, epoch, done)
        return self._further_ranks.destination(own, epoch)

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
        here.prompt_tokens, here.arrived = len(request.prompt), request.arrived
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
        size = await unless_broken(self._copier.copy(request_id, message), self._fail)
        self._sink.add(metrics.HANDOFF_BYTES, size)

    async def send_back(self, request_id: str, epoch: int, message: Any) -> Any:
        """Let a gang that goes on with a request have pages of it; what the transport answers.

        Raises:
            TransferError: as `deliver`.
        """
        self._check_epoch(request_id, epoch)
        return await unless_broken(self._copier.send_back(request_id, message), self._fail)

    def _check_epoch(self, request_id: str, epoch: int) -> None:
        request = self._requests.get(request_id)
        check_epoch(request_id, None if request is None else request.epoch, epoch)

    async def answer(self, request_id: str, logits: "Logits", order: AnswerOrder) -> None:
        """Generate from a prompt whose pages have all come; returns when all choices are finished.

        What is generated is said to the order's listener.

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
        request.answer_to(order)
        if order.scores is not None:
            self._outboxes.say(order.listener, request_id, order.scores)
        # Without waiting: other requests' copies may be in front, and the first token needs none.
        self._copier.close_soon(request_id)
        self._further_ranks.all_came(request_id)
        async with self._turn:
            self._check()
            outputs = self._engine.start(request_id, logits, request.constraint)
            self._deliver(outputs, are_over(self._engine, outputs))
        self._stepper.wake()
        async for _ in _heard(request):
            pass

    async def generate(
        self, request: GenerationRequest, order: AnswerOrder
    ) -> AsyncGenerator[Progress | ComputedHere, None]:
        """Compute a prompt, once there are pages for it, and generate from it, as `answer`.

        Yields Progress within the prompt, and ComputedHere at its end.

        Raises: as `reserve` and `answer`.
        """
        here = self._take(request)
        here.before = request.computed
        here.answer_to(order)
        await self._prepare(request, here)
        await self._admission.admit(request, here.constraint)
        self._stepper.wake()
        async for event in _heard(here):
            yield event

    async def fetch(self, listener: str) -> Said:
        """What was said to an ingress since its last call; waits a little for something."""
        return await self._outboxes.fetch(listener, BEAT_SECONDS)

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
            await self._further_ranks.close(request_id)
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
            self._outboxes.tick()
            lapsed = self._leases.tick()
            self._sink.add(metrics.LEASES_LAPSED, len(lapsed))
            for request_id in lapsed:
                logger.warning("request %s is released: no ingress wants it", request_id)
            for request_id in lapsed:
                # Its last copy may take its time, and others' leases go on.
                releasing = asyncio.create_task(self.release(request_id))
                self._releasing.add(releasing)
                releasing.add_done_callback(self._releasing.discard)

    def _after_step(self, stepped: Stepped) -> None:
        self._sink.observe(metrics.DECODE_STEP_TIME, stepped.seconds)
        began = stepped.ended - stepped.seconds
        for request_id, output in stepped.outputs:
            if isinstance(output, Progress):
                self._count_prompt(request_id, output, began, stepped.ended)
        self._deliver(stepped.outputs, stepped.over)
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
        if progress.done < progress.total:
            request.events.put_nowait(progress)
            return
        if request.clock is not None:
            request.clock.prompt_is_computed(request.computed)
        request.events.put_nowait(request.computed)

    def _deliver(self, outputs: "list[Output]", over: frozenset[str]) -> None:
        """Hand out what came out, and let others have the pages of those that ended.

        Args:
            over: the requests that generate nothing more.
        """
        pages_were_freed = False
        failed: set[str] = set()
        for request_id, output in outputs:
            if isinstance(output, Progress):
                continue
            if isinstance(output, Delta):
                pages_were_freed |= output.finish_reason is not None
                self._say(request_id, output)
                continue
            pages_were_freed = True
            failed.add(request_id)
            if (request := self._requests.get(request_id)) is not None:
                request.events.put_nowait(output)
        for request_id in over - failed:
            self._end(request_id)
        if pages_were_freed:
            self._admission.wake()

    def _say(self, request_id: str, delta: Delta) -> None:
        request = self._requests.get(request_id)
        if request is not None and request.clock is not None:
            request.clock.count(delta)
            self._outboxes.say(request.listener, request_id, delta)

    def _end(self, request_id: str) -> None:
        """All choices of a request are finished."""
        request = self._requests.get(request_id)
        if request is not None and request.clock is not None:
            self._outboxes.say(request.listener, request_id, request.clock.finished())
            request.events.put_nowait(None)

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


async def _heard(request: _Request) -> AsyncGenerator[Progress | ComputedHere, None]:
    """What comes for a request's life, until all choices are finished.

    Raises: what comes instead of the rest.
    """
    while (event := await request.events.get()) is not None:
        if isinstance(event, LongreachError):
            raise event
        yield event
