"""A request's life at a decode replica: reserved, prefilled, decoded, ended.

It reads from top to bottom in `RequestLife.events`. What is generated does not pass through here:
the worker says it to the ingress itself. States come in the order in which they are listed, and any
of them may be the last before ENDED: whatever goes wrong, or whoever leaves, ends a life in one
way, by releasing what the worker holds for it.
"""

import time
from collections.abc import AsyncGenerator, AsyncIterable
from contextlib import aclosing
from enum import Enum
from typing import Any, cast

from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from ...engine.errors import LostError
from ...engine.messages import (
    GenerationRequest,
    Prefilled,
    Progress,
    PromptScores,
    Timings,
)
from ..call_errors import first_of
from ..messages import AnswerOrder, ComputedHere, PrefillOrder
from ..streams import listening
from ..tasks import as_nobody, tell


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
        prefill: the deployment that computes its prompt, with streamed answers; None where the
            worker does it itself.
        listener: the ingress that the worker answers to.
    """

    def __init__(
        self,
        request: GenerationRequest,
        worker: Any,
        prefill: DeploymentHandle | None,
        listener: str,
    ) -> None:
        self._request = request
        self._worker, self.prefill = worker, prefill
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
        async with aclosing(self._prefilling(prefill, self._reserve())) as progress:
            async for event in progress:
                if isinstance(event, Prefilled):
                    prefilled = event
                else:
                    yield event
        if prefilled is None:
            raise LostError("prefill ended early; send the request again")
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

    def _reserve(self) -> PrefillOrder:
        """Have pages allocated, without waiting for them."""
        name = self._request.request_id
        return PrefillOrder(
            self._request,
            destination=as_nobody(self._worker.reserve.remote, self._request),
            released=as_nobody(self._worker.until_released.remote, name),
        )

    async def _prefilling(
        self, prefill: DeploymentHandle, order: PrefillOrder
    ) -> AsyncGenerator[Progress | Prefilled, None]:
        """Have the prompt computed into those pages; ends with Prefilled."""
        stream = cast(
            DeploymentResponseGenerator[Progress | Prefilled | None],
            prefill.prefill.remote(order),
        )
        try:
            await first_of(stream)
            async for event in listening(stream):
                if event is not None:
                    self.state = State.PREFILLING
                    yield event
        finally:
            stream.cancel()

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
