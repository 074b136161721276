"""A request's life at a decode replica: reserved, prefilled, decoded, ended.

It reads from top to bottom in `RequestLife.events`. What is generated does not pass through here:
the worker says it to the ingress itself. States come in the order in which they are listed, and any
of them may be the last before ENDED: whatever goes wrong, or whoever leaves, ends a life in one
way, by releasing what the worker holds for it.
"""

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing, nullcontext
from dataclasses import replace
from enum import Enum
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ...engine.errors import LongreachError, LostError, TransferError
from ...engine.messages import (
    GenerationRequest,
    Prefilled,
    Progress,
    PromptScores,
    Timings,
)
from .. import metrics
from ..call_errors import CallError, as_ours, first_of
from ..messages import AnswerOrder, ComputedHere, PrefillOrder
from ..metrics import Metrics
from ..recovery import Recovery, was_lost
from ..settings import HandOffTerms
from ..streams import listening
from ..tasks import as_nobody, tell
from .other_gangs import OtherGangs, PromptAtGang

_Stream = DeploymentResponseGenerator[Progress | Prefilled | None]

logger = logging.getLogger(__name__)


class State(Enum):
    """Where a request stands."""

    WAITING = "waiting"
    """For pages, and then for its prompt's first chunk."""
    PREFILLING = "prefilling"
    DECODING = "decoding"
    ENDED = "ended"


class RequestLife:
    """One request, from when a decode replica takes it until its last token.

    Args:
        worker: the handle of the decode worker's actor.
        terms: the worker's.
        prefill: the deployment that computes its prompt, with streamed answers; None where the
            worker does it itself.
        others: of the decode replica, which looks after the gangs of all its prompts.
        recovery: from gangs that die under it.
        sink: of the decode replica.
        listener: the ingress that the worker answers to.
    """

    def __init__(
        self,
        request: GenerationRequest,
        worker: Any,
        terms: HandOffTerms,
        prefill: DeploymentHandle | None,
        others: OtherGangs,
        recovery: Recovery,
        sink: Metrics,
        listener: str,
    ) -> None:
        self._request = request
        self._worker, self._terms, self.prefill = worker, terms, prefill
        self._others, self._recovery, self._sink = others, recovery, sink
        self._listener, self._taken = listener, time.time()
        self.state = State.WAITING
        # Before anything is said to anybody: each message takes its time.
        self._computing = self._compute() if prefill is None else None

    async def events(self) -> AsyncGenerator[Progress, None]:
        """How the prompt goes on; ends when everything is generated."""
        if self.prefill is not None:
            whole = self._by(self.prefill)
        else:
            assert self._computing is not None
            whole = self._at_the_worker(self._computing)
        async with aclosing(whole) as events:
            async for event in events:
                yield event

    def end(self) -> None:
        """Whatever happened, or whoever left: nothing is held for the request any more."""
        self.state = State.ENDED
        tell(self._worker.release.remote, self._request.request_id)

    async def _by(self, prefill: DeploymentHandle) -> AsyncGenerator[Progress, None]:
        """Have the prompt computed by a gang, and handed off to the worker."""
        prefilled = None
        async with aclosing(self._prefilled_by_some(prefill)) as progress:
            async for event in progress:
                if isinstance(event, Prefilled):
                    prefilled = event
                else:
                    yield event
        assert prefilled is not None
        self.state = State.DECODING
        order = self._order_after(prefilled)
        answer = self._worker.answer.remote
        await as_nobody(answer, self._request.request_id, prefilled.logits, order)

    def _compute(self) -> AsyncIterable[Any]:
        """Have the worker compute the prompt as well: one call, and no pages that travel."""
        answer = self._worker.generate.options(num_returns="streaming")
        order = AnswerOrder(self._listener, self._taken)
        return as_nobody(answer.remote, self._request, order)

    async def _at_the_worker(self, computing: AsyncIterable[Any]) -> AsyncGenerator[Progress, None]:
        """What the worker says of a prompt that it computes."""
        async for reference in computing:
            event = cast(Progress | ComputedHere, await reference)
            if isinstance(event, Progress):
                self.state = State.PREFILLING
                yield event
            else:
                self.state = State.DECODING

    async def _prefilled_by_some(
        self, prefill: DeploymentHandle
    ) -> AsyncGenerator[Progress | Prefilled, None]:
        """Have the prompt computed, by as many gangs one after the other as it takes.

        Where one is lost, the next goes on behind the pages that have come.
        """
        name = self._request.request_id
        order = PrefillOrder(
            self._request,
            destination=as_nobody(self._worker.reserve.remote, self._request),
            released=as_nobody(self._worker.until_released.remote, name),
            terms=self._terms,
        )
        while True:
            stream = cast(_Stream, prefill.prefill.remote(order))
            try:
                async with aclosing(
                    self._prefilling(stream, PromptAtGang(prefill, order.name))
                ) as events:
                    async for event in events:
                        yield event
                return
            except (*CallError, LongreachError) as error:
                ours = as_ours(error)
                lost, seconds = was_lost(ours), self._failed(ours)
                # Before the stream is cancelled: a gang that lives may then use its pages for
                # others, and until then this worker copies out of them.
                order = await self._order_the_rest(order)
                logger.warning("request %s asks another gang in %.1f s: %s", name, seconds, error)
            finally:
                stream.cancel()
            if lost:
                self._sink.add(metrics.REQUEST_RECOVERIES)
            await asyncio.sleep(seconds)

    async def _prefilling(
        self, stream: _Stream, prompt: PromptAtGang
    ) -> AsyncGenerator[Progress | Prefilled, None]:
        """What one gang says, to Prefilled, or until the prompt is to go on at another one."""
        await first_of(stream)
        # The scores of a prompt begin anew at another gang.
        may_go_on = self._recovery.begins_again and self._request.sampling.prompt_logprobs is None
        with self._others.watching(prompt) if may_go_on else nullcontext():
            async for event in listening(stream):
                if event is None:
                    continue
                self.state = State.PREFILLING
                if isinstance(event, Progress):
                    self._recovery.goes_on()
                    self._recovery.reach(event.done)
                yield event
                if isinstance(event, Progress) and prompt.is_to_go_on:
                    # Behind a chunk: its pages are on their way, and the next has only just begun.
                    raise LostError(
                        "the gang was asked to go, and another one goes on", begun=False
                    )
                if isinstance(event, Prefilled):
                    return
        raise LostError("prefill ended early; send the request again")

    def _failed(self, error: LongreachError) -> float:
        """Seconds after which another gang is asked; see `Recovery.failed`."""
        if isinstance(error, TransferError):
            # It is this worker that takes no pages.
            raise error
        return self._recovery.failed(error)

    async def _order_the_rest(self, order: PrefillOrder) -> PrefillOrder:
        """What the next gang is asked for."""
        try:
            # Whoever computes has waited for pages first; there is nothing to go on behind else.
            await order.destination
            destination = as_nobody(self._worker.go_on.remote, self._request.request_id)
            await destination
        except CallError as error:
            raise as_ours(error) from error
        computed = max(self._request.computed, self._recovery.reached[0])
        request = replace(self._request, computed=computed)
        return replace(order, request=request, destination=destination, number=order.number + 1)

    def _order_after(self, prefilled: Prefilled) -> AnswerOrder:
        """What the worker needs to know of a prompt that others have computed."""
        scores = None if prefilled.scores is None else PromptScores(prefilled.scores)
        timings = Timings(
            queued=prefilled.queued,
            prefill=prefilled.prefill,
            hand_off=prefilled.hand_off,
            first_token=0.0,
            served=0.0,
            prefill_stages=prefilled.stages,
        )
        return AnswerOrder(self._listener, self._taken, timings, time.time(), scores)
