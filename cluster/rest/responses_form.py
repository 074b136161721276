"""The answers of `/v1/responses`: what the chat answers, told in items and OpenAI's own events."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionTokenLogprob
from openai.types.completion_usage import CompletionUsage
from openai.types.responses import (
    Response,
    ResponseCompletedEvent,
    ResponseContentPartAddedEvent,
    ResponseContentPartDoneEvent,
    ResponseCreatedEvent,
    ResponseError,
    ResponseFailedEvent,
    ResponseFunctionCallArgumentsDeltaEvent,
    ResponseFunctionCallArgumentsDoneEvent,
    ResponseFunctionToolCall,
    ResponseIncompleteEvent,
    ResponseInProgressEvent,
    ResponseOutputItemAddedEvent,
    ResponseOutputItemDoneEvent,
    ResponseOutputMessage,
    ResponseOutputText,
    ResponseTextDeltaEvent,
    ResponseTextDoneEvent,
    ResponseUsage,
)
from openai.types.responses.response import IncompleteDetails
from openai.types.responses.response_output_text import Logprob
from openai.types.responses.response_text_delta_event import Logprob as DeltaLogprob
from openai.types.responses.response_usage import InputTokensDetails, OutputTokensDetails
from pydantic import BaseModel

from ...engine.messages import Delta, Finished
from .answers import ChatForm, TokenTexts
from .errors import RestError
from .form import Form
from .plan import Plan

_ItemStatus = Literal["in_progress", "completed", "incomplete"]
_Logprobs = list[ChatCompletionTokenLogprob]


@dataclass
class _Text:
    """A message of the answer, as far as it is known."""

    id: str
    text: str = ""
    logprobs: _Logprobs = field(default_factory=list)

    def item(self, status: _ItemStatus) -> ResponseOutputMessage:
        """Without content while it has only begun."""
        content = [] if status == "in_progress" else [self.content]
        return ResponseOutputMessage(
            id=self.id, type="message", role="assistant", status=status, content=[*content]
        )

    @property
    def content(self) -> ResponseOutputText:
        logprobs = [Logprob.model_validate(each.model_dump()) for each in self.logprobs]
        return ResponseOutputText(
            type="output_text", annotations=[], text=self.text, logprobs=logprobs
        )


@dataclass
class _Call:
    """A call of a function, as far as it is known."""

    id: str
    call_id: str
    name: str
    arguments: str = ""

    def item(self, status: _ItemStatus) -> ResponseFunctionToolCall:
        return ResponseFunctionToolCall(
            id=self.id,
            type="function_call",
            call_id=self.call_id,
            name=self.name,
            arguments=self.arguments,
            status=status,
        )


class ResponsesForm(Form):
    """`response`, and the events that build it up."""

    names_events = True

    def __init__(self, plan: Plan, model_name: str, texts: TokenTexts) -> None:
        self._plan = plan
        self._model_name = model_name
        self._chat = ChatForm(plan, model_name, texts)
        self._items: list[_Text | _Call] = []
        self._calls: dict[int, _Call] = {}
        self._is_cut = False
        self._number = 0

    def collect(self, choice: int, delta: Delta) -> None:
        self._chat.collect(choice, delta)

    def answer(self, finished: Sequence[Finished]) -> BaseModel:
        chat = self._chat.answer(finished)
        assert isinstance(chat, ChatCompletion)
        [choice] = chat.choices
        self._is_cut = choice.finish_reason == "length"
        calls = choice.message.tool_calls or []
        if choice.message.content or not calls:
            logprobs = choice.logprobs.content if choice.logprobs else None
            self._items.append(
                _Text(self._item_id("msg"), choice.message.content or "", [*(logprobs or [])])
            )
        for call in calls:
            assert call.type == "function"
            name, arguments = call.function.name, call.function.arguments
            self._items.append(_Call(self._item_id("fc"), call.id, name, arguments))
        return self._whole(finished)

    def beginning(self) -> Sequence[BaseModel]:
        response = self._response("in_progress")
        return [
            ResponseCreatedEvent(type="response.created", response=response, **self._numbered()),
            ResponseInProgressEvent(
                type="response.in_progress", response=response, **self._numbered()
            ),
        ]

    def events(self, choice: int, delta: Delta) -> Sequence[BaseModel]:
        return [
            event
            for chunk in self._chat.events(choice, delta)
            if isinstance(chunk, ChatCompletionChunk)
            for event in self._events_of(chunk)
        ]

    def empty_events(self) -> Sequence[BaseModel]:
        """A delta of nothing where a text goes on; else that the response is in progress."""
        if self._items and isinstance(last := self._items[-1], _Text):
            return [self._text_delta(last, "", [])]
        response = self._response("in_progress")
        return [
            ResponseInProgressEvent(
                type="response.in_progress", response=response, **self._numbered()
            )
        ]

    def progress_events(self, processed: int, seconds: float) -> Sequence[BaseModel]:
        """Nobody can ask for them here."""
        return self.empty_events()

    def ending(self, finished: Sequence[Finished]) -> Sequence[BaseModel]:
        events = [*self._open(_Text(self._item_id("msg")))] if not self._items else []
        events += self._close()
        response = self._whole(finished)
        if self._is_cut:
            last = ResponseIncompleteEvent(
                type="response.incomplete", response=response, **self._numbered()
            )
        else:
            last = ResponseCompletedEvent(
                type="response.completed", response=response, **self._numbered()
            )
        return [*events, last]

    def failure(self, error: RestError) -> Sequence[BaseModel]:
        response = self._response("failed", "incomplete")
        code = "rate_limit_exceeded" if error.status == 429 else "server_error"
        response.error = ResponseError(code=code, message=error.message)
        return [ResponseFailedEvent(type="response.failed", response=response, **self._numbered())]

    def _events_of(self, chunk: ChatCompletionChunk) -> Iterator[BaseModel]:
        for choice in chunk.choices:
            self._is_cut = self._is_cut or choice.finish_reason == "length"
            logprobs = (choice.logprobs.content if choice.logprobs else None) or []
            if choice.delta.content or logprobs:
                yield from self._say(choice.delta.content or "", logprobs)
            for call in choice.delta.tool_calls or ():
                function = call.function
                if call.index not in self._calls:
                    name = (function.name if function else None) or ""
                    begun = _Call(self._item_id("fc"), call.id or "", name)
                    self._calls[call.index] = begun
                    yield from self._close()
                    yield from self._open(begun)
                if function and function.arguments:
                    yield self._call_delta(self._calls[call.index], function.arguments)

    def _say(self, text: str, logprobs: _Logprobs) -> Iterator[BaseModel]:
        if not self._items or not isinstance(self._items[-1], _Text):
            yield from self._close()
            yield from self._open(_Text(self._item_id("msg")))
        last = self._items[-1]
        assert isinstance(last, _Text)
        last.text += text
        last.logprobs.extend(logprobs)
        yield self._text_delta(last, text, logprobs)

    def _open(self, item: _Text | _Call) -> Iterator[BaseModel]:
        self._items.append(item)
        yield ResponseOutputItemAddedEvent(
            type="response.output_item.added",
            item=item.item("in_progress"),
            output_index=self._last_index,
            **self._numbered(),
        )
        if isinstance(item, _Text):
            yield ResponseContentPartAddedEvent(
                type="response.content_part.added",
                part=ResponseOutputText(type="output_text", annotations=[], text=""),
                **self._place(item),
            )

    def _close(self) -> Iterator[BaseModel]:
        """The last item has all that it gets."""
        if not self._items:
            return
        item = self._items[-1]
        if isinstance(item, _Text):
            yield ResponseTextDoneEvent(
                type="response.output_text.done",
                text=item.text,
                logprobs=_delta_logprobs(item.logprobs),  # type: ignore[arg-type]
                **self._place(item),
            )
            yield ResponseContentPartDoneEvent(
                type="response.content_part.done", part=item.content, **self._place(item)
            )
        else:
            yield ResponseFunctionCallArgumentsDoneEvent(
                type="response.function_call_arguments.done",
                item_id=item.id,
                arguments=item.arguments,
                output_index=self._last_index,
                **self._numbered(),
            )
        yield ResponseOutputItemDoneEvent(
            type="response.output_item.done",
            item=item.item(self._last_status),
            output_index=self._last_index,
            **self._numbered(),
        )

    def _text_delta(self, item: _Text, text: str, logprobs: _Logprobs) -> BaseModel:
        return ResponseTextDeltaEvent(
            type="response.output_text.delta",
            delta=text,
            logprobs=_delta_logprobs(logprobs),
            **self._place(item),
        )

    def _call_delta(self, item: _Call, arguments: str) -> BaseModel:
        item.arguments += arguments
        return ResponseFunctionCallArgumentsDeltaEvent(
            type="response.function_call_arguments.delta",
            item_id=item.id,
            delta=arguments,
            output_index=self._items.index(item),
            **self._numbered(),
        )

    @property
    def _last_index(self) -> int:
        return len(self._items) - 1

    @property
    def _last_status(self) -> _ItemStatus:
        return "incomplete" if self._is_cut else "completed"

    def _item_id(self, kind: str) -> str:
        return f"{kind}_{self._plan.answer_id}_{len(self._items)}"

    def _numbered(self) -> dict[str, Any]:
        self._number += 1
        return {"sequence_number": self._number - 1}

    def _place(self, item: _Text) -> dict[str, Any]:
        place = {"item_id": item.id, "output_index": self._last_index, "content_index": 0}
        return {**place, **self._numbered()}

    def _whole(self, finished: Sequence[Finished]) -> Response:
        response = self._response(self._last_status, self._last_status)
        response.usage = _usage(self._chat.usage(finished))
        if self._is_cut:
            response.incomplete_details = IncompleteDetails(reason="max_output_tokens")
        return response

    def _response(
        self,
        status: Literal["in_progress", "completed", "incomplete", "failed"],
        last: _ItemStatus = "in_progress",
    ) -> Response:
        """As it is now; `last` is the status of the last item."""
        before: list[_ItemStatus] = ["completed"] * self._last_index
        statuses: list[_ItemStatus] = [*before, last]
        items = [item.item(each) for item, each in zip(self._items, statuses, strict=False)]
        return Response.model_validate(
            {
                "id": self._plan.answer_id,
                "object": "response",
                "created_at": self._chat.created,
                "status": status,
                "error": None,
                "incomplete_details": None,
                "model": self._model_name,
                "output": [item.model_dump(by_alias=True, exclude_unset=True) for item in items],
                "parallel_tool_calls": True,
                "previous_response_id": None,
                "store": False,
                "tool_choice": "auto",
                "tools": [],
                "truncation": "disabled",
                "usage": None,
                **self._plan.repeated,
            }
        )


def _delta_logprobs(logprobs: _Logprobs) -> list[DeltaLogprob]:
    return [DeltaLogprob.model_validate(each.model_dump()) for each in logprobs]


def _usage(usage: CompletionUsage) -> ResponseUsage:
    return ResponseUsage(
        input_tokens=usage.prompt_tokens,
        input_tokens_details=InputTokensDetails(cached_tokens=0, cache_write_tokens=0),
        output_tokens=usage.completion_tokens,
        output_tokens_details=OutputTokensDetails(reasoning_tokens=0),
        total_tokens=usage.total_tokens,
    )
