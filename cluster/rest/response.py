"""Sends an answer while it is generated, and stops generating when nobody listens any more."""

import asyncio
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing

from fastapi.responses import Response
from pydantic import BaseModel
from starlette.types import Message, Receive, Scope, Send

from ...engine.errors import CancelledElsewhereError, UnavailableError
from ...engine.messages import Delta, Finished, Progress, PromptScores
from .errors import RestError, as_rest_error
from .form import Form
from .generation import Arrival, Backend, Generation
from .limits import SignsOfLife
from .meter import Meter
from .plan import Plan

MAX_TOKENS_HEADER = "x-longreach-max-tokens"
"""Says how many tokens an answer may have, where more were asked for."""

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    # Asks proxies of nginx's kind not to hold events back.
    "x-accel-buffering": "no",
}
_JSON = "application/json"
# A client that leaves is seen by Serve first, which cancels what runs for it, and then by us.
_NOTICE_SECONDS = 1.0


class AnswerResponse(Response):
    """Runs a plan. No status is sent before the backend's first word, or a first sign of life.

    So whatever a backend refuses at once is refused with a proper status, streaming or not.
    """

    def __init__(
        self,
        backend: Backend,
        plan: Plan,
        answer: Form,
        meter: Meter,
        signs_of_life: SignsOfLife,
    ) -> None:
        super().__init__()
        self._backend = backend
        self._plan = plan
        self._answer = answer
        self._meter = meter
        self._signs = signs_of_life
        clamped_to = plan.clamped_to
        self._headers = {} if clamped_to is None else {MAX_TOKENS_HEADER: str(clamped_to)}
        self._last_event = time.monotonic()
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
        if self._plan.stream:
            return await self._streamed(scope, receive, send)
        whole = _WholeAnswer(self._signs.white_space_seconds, self._headers)
        async with Generation(self._backend, self._plan) as generation:
            response, outcome = await self._collected(generation, whole, send)
        await whole.end(response, scope, receive, send)
        return outcome

    async def _streamed(self, scope: Scope, receive: Receive, send: Send) -> str:
        async with Generation(self._backend, self._plan) as generation:
            try:
                first = await generation.next(self._signs.silence)
            except Exception as error:
                refusal = await self._refusal(error)
                await refusal.response()(scope, receive, send)
                return refusal.outcome
            return await self._stream(generation, first, send)

    async def _collected(
        self, generation: Generation, whole: "_WholeAnswer", send: Send
    ) -> tuple[Response, str]:
        """The whole answer, or what is said in its place, and the outcome."""
        try:
            while not generation.done:
                item = await generation.next(whole.patience)
                if item is not None:
                    self._collect(item)
                await whole.keep_alive(send)
            data = _json(self._answer.answer(self._closing()))
        except _ClientGoneError:
            raise
        except Exception as error:
            refusal = await self._refusal(error)
            return refusal.response(), refusal.outcome
        return Response(data, 200, self._headers, _JSON), "success"

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

    def _collect(self, item: Arrival) -> None:
        self._note(item)
        if isinstance(item.event, Delta):
            self._answer.collect(self._choice(item.index, item.event), item.event)

    async def _stream(self, generation: Generation, item: Arrival | None, send: Send) -> str:
        headers = _raw({**_STREAM_HEADERS, **self._headers})
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        async with aclosing(self._parts(generation, item)) as parts:
            async for data in parts:
                await self._send(send, data)
        await self._send(send, self._answer.end_of_stream)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        return "success" if self._failure is None else self._failure.outcome

    async def _parts(
        self, generation: Generation, item: Arrival | None
    ) -> AsyncGenerator[bytes, None]:
        """All that a stream says before it ends; what went wrong, if anything, is the last."""
        try:
            yield self._events(self._answer.beginning())
            while not generation.done:
                yield self._said(item)
                item = await generation.next(self._signs.silence)
            yield self._events(self._answer.ending(self._closing()))
        except Exception as error:
            self._failure = await self._refusal(error)
            yield self._events(self._answer.failure(self._failure))

    def _said(self, item: Arrival | None) -> bytes:
        """What a stream says about an event, or about none having come for a while."""
        if item is None:
            return self._sign_of_life()
        self._note(item)
        match event := item.event:
            case Progress():
                return self._sign_of_life()
            case Delta():
                return self._events(self._answer.events(self._choice(item.index, event), event))
            case Finished() | PromptScores():
                return b""

    def _sign_of_life(self) -> bytes:
        """That the answer is under way, in the way that the client or its gateway understands."""
        prefilling = len(self._begun) < len(self._plan.requests)
        if prefilling and self._plan.return_progress:
            seconds = max(time.time() - self._plan.arrived, 0.0)
            return self._events(self._answer.progress_events(sum(self._prefilled), seconds))
        most = self._signs.empty_delta_seconds
        if most is not None and time.monotonic() - self._last_event >= most:
            return self._events(self._answer.empty_events())
        return self._comment()

    def _events(self, events: Sequence[BaseModel]) -> bytes:
        if events:
            self._last_event = time.monotonic()
        return b"".join(map(self._event, events))

    def _event(self, model: BaseModel) -> bytes:
        name = f"event: {getattr(model, 'type')}\n" if self._answer.names_events else ""  # noqa: B009
        return name.encode() + b"data: " + _json(model) + b"\n\n"

    def _note(self, item: Arrival) -> None:
        self._meter.saw(item)
        index, event = item.index, item.event
        match event:
            case Progress(done=done):
                self._prefilled[index] = done
            case Delta():
                self._prefilled[index] = len(self._plan.requests[index].prompt)
                self._begun.add(index)
            case PromptScores():
                self._answer.keep_scores(index, event)
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


class _WholeAnswer:
    """An answer that is sent whole; until it is there white space may keep the connection alive.

    The status and the headers go out with the first of it. What is an error after that comes with
    200, and is told by its body.
    """

    def __init__(self, patience: float | None, headers: Mapping[str, str]) -> None:
        self.patience = patience
        self._headers = {"content-type": _JSON, **headers}
        self._said_last = time.monotonic()
        self._has_begun = False

    async def keep_alive(self, send: Send) -> None:
        """Send white space where nothing was sent for as long as is wished."""
        if self.patience is None or time.monotonic() - self._said_last < self.patience:
            return
        self._said_last = time.monotonic()
        if not self._has_begun:
            self._has_begun = True
            headers = _raw(self._headers)
            await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": b" ", "more_body": True})

    async def end(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer, or what is said in its place."""
        if self._has_begun:
            body = response.body
            await send({"type": "http.response.body", "body": body, "more_body": False})
        else:
            await response(scope, receive, send)


def _raw(headers: Mapping[str, str]) -> list[tuple[bytes, bytes]]:
    return [(name.encode("latin-1"), value.encode("latin-1")) for name, value in headers.items()]


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
    return model.model_dump_json(by_alias=True, exclude_unset=True).encode()
