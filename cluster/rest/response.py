"""Sends an answer while it is generated, and stops generating when nobody listens any more."""

import asyncio
import json
from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from ...engine.errors import CancelledElsewhereError, UnavailableError
from ...engine.messages import Delta, Finished, Progress
from .answers import AnswerFormat
from .errors import RestError, as_rest_error
from .generation import Arrival, Backend, Generation
from .meter import Meter
from .plan import Plan

_STREAM_HEADERS = (
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    # Asks proxies of nginx's kind not to hold events back.
    (b"x-accel-buffering", b"no"),
)
_END_OF_STREAM = b"data: [DONE]\n\n"
_JSON = "application/json"
# A client that leaves is seen by Serve first, which cancels what runs for it, and then by us.
_NOTICE_SECONDS = 1.0


class AnswerResponse(Response):
    """Runs a plan. The status is not sent before the backend's first word or `quiet_seconds`.

    So whatever a backend refuses at once is refused with a proper status, streaming or not. From
    then on a stream is never silent for longer than `quiet_seconds`.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        answer: AnswerFormat,
        meter: Meter,
        quiet_seconds: float,
    ) -> None:
        super().__init__()
        self._backend = backend
        self._plan = plan
        self._answer = answer
        self._meter = meter
        self._quiet_seconds = quiet_seconds
        self._finished: dict[int, Finished] = {}
        self._prefilled = [0] * len(plan.requests)
        self._begun: set[int] = set()
        self._failure: RestError | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer; the client's going away, or a cancellation, stops the work."""
        self._meter.began()
        work = asyncio.create_task(self._run(scope, receive, _noticing(send)))
        self._gone = asyncio.create_task(_client_gone(receive))
        outcome = "cancelled"
        try:
            await asyncio.wait({work, self._gone}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                outcome = "failed"
                outcome = _outcome_of(work)
        finally:
            work.cancel()
            self._gone.cancel()
            try:
                await asyncio.gather(work, self._gone, return_exceptions=True)
            finally:
                # Whoever noticed as well that the client is gone may cancel this a second time.
                self._meter.ended(outcome)

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> str:
        """The outcome, once everything is sent."""
        async with Generation(self._backend, self._plan) as generation:
            first, whole = None, b""
            try:
                if self._plan.stream:
                    first = await generation.next(self._quiet_seconds)
                else:
                    whole = await self._collect(generation)
            except Exception as error:
                refusal = await self._refusal(error)
                await refusal.response()(scope, receive, send)
                return refusal.outcome
            if self._plan.stream:
                return await self._stream(generation, first, send)
        await Response(whole, 200, media_type=_JSON)(scope, receive, send)
        return "success"

    async def _refusal(self, error: Exception) -> RestError:
        """What to tell the client about an error, unless it is gone.

        Raises:
            _ClientGoneError: the client left, and the error is only how we learned of it first.
        """
        if isinstance(error, CancelledElsewhereError):
            await asyncio.wait({self._gone}, timeout=_NOTICE_SECONDS)
            if self._gone.done():
                raise _ClientGoneError
        return as_rest_error(error, self._plan.request_id)

    async def _collect(self, generation: Generation) -> bytes:
        """The whole answer."""
        while (item := await generation.next()) is not None:
            self._note(item)
            if isinstance(item.event, Delta):
                self._answer.collect(self._choice(item.index, item.event), item.event)
        return _json(self._answer.answer(self._closing()))

    async def _stream(self, generation: Generation, item: Arrival | None, send: Send) -> str:
        headers = list(_STREAM_HEADERS)
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._parts(generation, item)) as parts:
            async for data in parts:
                await self._send(send, data)
        await self._send(send, _END_OF_STREAM)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "success" if self._failure is None else self._failure.outcome

    async def _parts(
        self, generation: Generation, item: Arrival | None
    ) -> AsyncGenerator[bytes, None]:
        """All that a stream says before it ends; what went wrong, if anything, is the last."""
        try:
            while not generation.done:
                yield self._said(item)
                item = await generation.next(self._quiet_seconds)
            finished = self._closing()
            if self._plan.include_usage:
                yield _event(self._answer.usage_chunk(finished))
        except Exception as error:
            self._failure = await self._refusal(error)
            yield b"data: " + json.dumps(self._failure.body).encode() + b"\n\n"

    def _said(self, item: Arrival | None) -> bytes:
        """What a stream says about an event, or about none having come for a while."""
        if item is None:
            return self._comment()
        self._note(item)
        match event := item.event:
            case Progress():
                return self._comment()
            case Delta():
                index = item.index
                chunk = self._answer.chunk(self._choice(index, event), event)
                return b"" if chunk is None else _event(chunk)
            case Finished():
                return b""

    def _note(self, item: Arrival) -> None:
        self._meter.saw(item)
        index, event = item.index, item.event
        match event:
            case Progress(done=done):
                self._prefilled[index] = done
            case Delta():
                self._prefilled[index] = len(self._plan.requests[index].prompt)
                self._begun.add(index)
            case Finished():
                self._finished[index] = event

    def _comment(self) -> bytes:
        """A line that OpenAI clients skip."""
        if len(self._begun) == len(self._plan.requests):
            return b": still generating\n\n"
        done, total = sum(self._prefilled), self._plan.prompt_tokens
        return f": prefill {100 * done // total}% {done}/{total}\n\n".encode()

    def _choice(self, index: int, delta: Delta) -> int:
        return index * self._plan.choices + delta.choice

    def _closing(self) -> list[Finished]:
        if len(self._finished) < len(self._plan.requests):
            raise UnavailableError("the answer ended early; send the request again")
        return [self._finished[index] for index in range(len(self._plan.requests))]

    async def _send(self, send: Send, data: bytes) -> None:
        if data:
            await send({"type": "http.response.body", "body": data, "more_body": True})


class _ClientGoneError(Exception):
    """Nothing that is sent arrives any more."""


def _noticing(send: Send) -> Send:
    """The same `send`; a connection that broke while we wrote is a client that went away."""

    async def send_or_notice(message: Message) -> None:
        try:
            await send(message)
        except OSError as error:
            raise _ClientGoneError from error

    return send_or_notice


def _outcome_of(work: "asyncio.Task[str]") -> str:
    """How a request ended whose work is done.

    Raises:
        Exception: whatever the work failed with that was not the client's doing.
    """
    try:
        return work.result()
    except _ClientGoneError:
        return "cancelled"
    except asyncio.CancelledError as error:
        raise CancelledElsewhereError from error


async def _client_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _json(model: BaseModel) -> bytes:
    return model.model_dump_json(exclude_unset=True).encode()


def _event(model: BaseModel) -> bytes:
    return b"data: " + _json(model) + b"\n\n"
