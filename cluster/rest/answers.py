"""OpenAI's answers: chats and completions, whole or in chunks, built with their own types."""

import codecs
import dataclasses
import math
import time
from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, cast

from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionTokenLogprob,
)
from openai.types.chat.chat_completion import Choice as ChatChoice
from openai.types.chat.chat_completion import ChoiceLogprobs
from openai.types.chat.chat_completion_chunk import Choice as ChunkChoice
from openai.types.chat.chat_completion_chunk import (
    ChoiceDelta,
    ChoiceDeltaToolCall,
    ChoiceDeltaToolCallFunction,
)
from openai.types.chat.chat_completion_chunk import ChoiceLogprobs as ChunkLogprobs
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from pydantic import BaseModel

from ...engine.decode.detokenizer import TokenBytes
from ...engine.messages import ChosenToken, Delta, Finished, PromptScores, ScoredToken, Tokens
from ...engine.text.tokenizer import Tokenizer
from .errors import RestError
from .form import Form
from .plan import Plan
from .tool_calls import Arguments, CallBegun, Content, Piece, ToolCallReader

FinishReason = Literal["stop", "length"]
_NOTHING = Delta(0, "")


class TokenTexts:
    """What a single token looks like in log-probabilities."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._raw = tokenizer.raw
        self._bytes = TokenBytes(tokenizer.raw)

    def bytes_of(self, token_id: int, shows_control: bool = False) -> bytes:
        """The bytes a token adds to the text; a control token adds none where it is not shown."""
        return self._bytes.spelled(token_id) if shows_control else self._bytes[token_id]

    def name(self, token_id: int) -> str:
        """The token as text; unlike `exact_name`, broken characters show as U+FFFD."""
        return self._bytes[token_id].decode(errors="replace") or self._control_name(token_id)

    def exact_name(self, token_id: int) -> str:
        """As `name`, but part of a character is `bytes:\\xe2\\x82`, so that names differ."""
        data = self._bytes[token_id]
        try:
            return data.decode() or self._control_name(token_id)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)

    def _control_name(self, token_id: int) -> str:
        return self._raw.id_to_token(token_id) or f"<|unused_{token_id}|>"


class _Failure(BaseModel):
    """The last event of a stream that failed."""

    error: dict[str, str | None]


@dataclass
class _Collected:
    """One choice of an answer that is sent whole."""

    text: list[str] = field(default_factory=list)
    tokens: list[ChosenToken] = field(default_factory=list)
    finish_reason: FinishReason = "stop"


class AnswerForm(Form):
    """Of the two older interfaces: choices, and chunks of them."""

    end_of_stream = b"data: [DONE]\n\n"

    def __init__(self, plan: Plan, model_name: str, texts: TokenTexts) -> None:
        self._plan = plan
        self._texts = texts
        sampling = plan.requests[0].sampling
        self._with_logprobs = sampling.top_logprobs is not None
        self._shows_control = not sampling.skip_special_tokens
        self._common: dict[str, Any] = {
            "id": plan.answer_id,
            "created": int(time.time()),
            "model": model_name,
        }
        self._collected: defaultdict[int, _Collected] = defaultdict(_Collected)
        self._completion_tokens = 0
        self._ended: set[int] = set()
        self._scores: dict[int, list[ScoredToken]] = {}

    def keep_scores(self, index: int, scores: PromptScores) -> None:
        self._scores[index] = list(scores.tokens(self._plan.requests[index].prompt))

    def _shown(self, delta: Delta) -> Delta:
        """What is shown of a delta."""
        return replace(delta, text="", tokens=()) if self._plan.prompt_only else delta

    def _prompt_logprobs(self, index: int) -> list[dict[str, Any] | None]:
        """Of a prompt, in vLLM's form: nothing for its first token."""
        return [None, *(self._all_scored(token) for token in self._scores[index])]

    def _all_scored(self, token: ScoredToken) -> dict[str, Any]:
        chosen = token.chosen
        best = [(each.token_id, each.logprob, rank) for rank, each in enumerate(chosen.top, 1)]
        own = (chosen.token_id, chosen.logprob, token.rank)
        named = {token_id: (logprob, rank) for token_id, logprob, rank in [own, *best]}
        return {
            str(token_id): {
                "logprob": logprob,
                "rank": rank,
                "decoded_token": self._texts.name(token_id),
            }
            for token_id, (logprob, rank) in named.items()
        }

    def collect(self, choice: int, delta: Delta) -> None:
        """Keep a part of an answer that will be sent whole."""
        delta = self._shown(delta)
        collected = self._collected[choice]
        collected.text.append(delta.text)
        if self._with_logprobs:
            collected.tokens.extend(delta.tokens)
        if delta.finish_reason is not None:
            collected.finish_reason = _finish_reason(delta)

    @property
    def created(self) -> int:
        """When, in seconds since 1970."""
        return self._common["created"]

    def events(self, choice: int, delta: Delta) -> Sequence[BaseModel]:
        """One, or none when the delta says nothing to a client."""
        delta = self._shown(delta)
        self._completion_tokens += len(delta.tokens)
        if delta.finish_reason:
            self._ended.add(choice)
        words = self._words(choice, delta)
        says_something = words or delta.finish_reason
        if not says_something and not (self._with_logprobs and delta.tokens):
            return ()
        return (self._chunk(choice, delta, words, self._chunk_common()),)

    def empty_events(self) -> Sequence[BaseModel]:
        """One of a choice that goes on."""
        return (self._chunk(self._going_on(), _NOTHING, {}, self._chunk_common()),)

    def progress_events(self, processed: int, seconds: float) -> Sequence[BaseModel]:
        """One, in llama.cpp's form."""
        progress = {
            "total": self._plan.prompt_tokens,
            "cache": 0,
            "processed": processed,
            "time_ms": round(1000 * seconds),
        }
        common = {**self._chunk_common(), "prompt_progress": progress}
        return (self._chunk(self._going_on(), _NOTHING, {}, common),)

    def _going_on(self) -> int:
        """The first choice that has not ended; the last, where all have."""
        last = self._plan.total_choices - 1
        return next((each for each in range(last) if each not in self._ended), last)

    def ending(self, finished: Sequence[Finished]) -> Sequence[BaseModel]:
        """Usage, where the client asked for it."""
        if not self._plan.include_usage:
            return ()
        return (self._empty_chunk({**self._common, **self._closing(finished)}),)

    def failure(self, error: RestError) -> Sequence[BaseModel]:
        """As the body of a refusal."""
        return (_Failure(**error.body),)

    def usage(self, finished: Sequence[Finished]) -> CompletionUsage:
        """Of the whole request."""
        if self._plan.prompt_only:
            return self._usage(0)
        return self._usage(sum(one.completion_tokens for one in finished))

    def answer(self, finished: Sequence[Finished]) -> BaseModel:
        """The whole answer, from what was collected."""
        common = {**self._common, **self._closing(finished)}
        choices = [(index, self._collected[index]) for index in range(self._plan.total_choices)]
        return self._answer(choices, common)

    @abstractmethod
    def _words(self, choice: int, delta: Delta) -> dict[str, Any]:
        """The fields of a chunk that say what a delta does; none where it says nothing yet."""

    @abstractmethod
    def _chunk(
        self, choice: int, delta: Delta, words: dict[str, Any], common: dict[str, Any]
    ) -> BaseModel: ...

    @abstractmethod
    def _empty_chunk(self, common: dict[str, Any]) -> BaseModel: ...

    @abstractmethod
    def _answer(
        self, choices: Iterable[tuple[int, _Collected]], common: dict[str, Any]
    ) -> BaseModel: ...

    def _chunk_common(self) -> dict[str, Any]:
        if self._plan.continuous_usage:
            return {**self._common, "usage": self._usage(self._completion_tokens)}
        return {**self._common, "usage": None} if self._plan.include_usage else self._common

    def _usage(self, completion_tokens: int) -> CompletionUsage:
        prompt_tokens = self._plan.prompt_tokens
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=0),
        )

    def _closing(self, finished: Sequence[Finished]) -> dict[str, Any]:
        """Usage, and where the time of each prompt went (an extension of OpenAI's shape)."""
        return {
            "usage": self.usage(finished),
            "longreach": {"timings": [dataclasses.asdict(one.timings) for one in finished]},
        }


class ChatForm(AnswerForm):
    """`chat.completion` and `chat.completion.chunk`."""

    def __init__(self, plan: Plan, model_name: str, texts: TokenTexts) -> None:
        super().__init__(plan, model_name, texts)
        self._begun: set[int] = set()
        self._calls = defaultdict(partial(ToolCallReader, plan.one_call))

    def _words(self, choice: int, delta: Delta) -> dict[str, Any]:
        if not self._plan.calls_tools:
            return {"content": delta.text} if delta.text else {}
        reader = self._calls[choice]
        pieces = reader.push(delta.text)
        if delta.finish_reason:
            pieces += reader.finish()
        text, calls = _content_of(pieces), _call_deltas(pieces)
        return {**({"content": text} if text else {}), **({"tool_calls": calls} if calls else {})}

    def _chunk(
        self, choice: int, delta: Delta, words: dict[str, Any], common: dict[str, Any]
    ) -> BaseModel:
        words = words or {"content": ""}
        if choice not in self._begun:
            self._begun.add(choice)
            words = {"role": "assistant", **words}
        num_calls = self._calls[choice].num_calls
        content: dict[str, Any] = {
            "index": choice,
            "delta": ChoiceDelta(**words),
            "finish_reason": _with_calls(_finish_reason(delta), num_calls)
            if delta.finish_reason
            else None,
        }
        if self._with_logprobs:
            content["logprobs"] = ChunkLogprobs(content=self._logprobs(delta.tokens))
        return ChatCompletionChunk(
            object="chat.completion.chunk", choices=[ChunkChoice(**content)], **common
        )

    def _empty_chunk(self, common: dict[str, Any]) -> BaseModel:
        return ChatCompletionChunk(object="chat.completion.chunk", choices=[], **common)

    def _answer(
        self, choices: Iterable[tuple[int, _Collected]], common: dict[str, Any]
    ) -> BaseModel:
        scores: dict[str, Any] = {}
        if self._plan.shows_scores:
            scores = {"prompt_logprobs": self._prompt_logprobs(0)}
        return ChatCompletion(
            object="chat.completion",
            choices=[self._choice(index, collected) for index, collected in choices],
            **common,
            **scores,
        )

    def _choice(self, index: int, collected: _Collected) -> ChatChoice:
        logprobs = None
        if self._with_logprobs:
            logprobs = ChoiceLogprobs(content=self._logprobs(collected.tokens))
        text = "".join(collected.text)
        pieces: list[Piece] = [Content(text)]
        if self._plan.calls_tools:
            reader = ToolCallReader(self._plan.one_call)
            pieces = reader.push(text) + reader.finish()
        calls = _whole_calls(pieces)
        text = _content_of(pieces)
        words: dict[str, Any] = {"content": text}
        if calls:
            words = {"content": text or None, "tool_calls": calls}
        return ChatChoice(
            index=index,
            message=ChatCompletionMessage(role="assistant", **words),
            finish_reason=_with_calls(collected.finish_reason, len(calls)),
            logprobs=logprobs,
        )

    def _logprobs(self, tokens: Iterable[ChosenToken]) -> list[ChatCompletionTokenLogprob]:
        return [
            ChatCompletionTokenLogprob(
                **self._token(chosen.token_id, chosen.logprob),
                top_logprobs=[
                    TopLogprob(**self._token(top.token_id, top.logprob)) for top in chosen.top
                ],
            )
            for chosen in tokens
        ]

    def _token(self, token_id: int, logprob: float) -> dict[str, Any]:
        data = list(self._texts.bytes_of(token_id, self._shows_control))
        return {"token": self._texts.name(token_id), "bytes": data, "logprob": logprob}


class CompletionForm(AnswerForm):
    """`text_completion`, whose chunks look like its answers."""

    def __init__(self, plan: Plan, model_name: str, texts: TokenTexts) -> None:
        super().__init__(plan, model_name, texts)
        self._offsets: defaultdict[int, _TextOffset] = defaultdict(_TextOffset)
        self._echoed: set[int] = set()
        self._scored: set[int] = set()

    def _words(self, choice: int, delta: Delta) -> dict[str, Any]:
        text = self._echo(choice) + delta.text
        return {"text": text} if text else {}

    def _echo(self, choice: int) -> str:
        """The prompt's text, control tokens included, before the first of an answer."""
        if not self._plan.echo or choice in self._echoed:
            return ""
        self._echoed.add(choice)
        data = (self._texts.bytes_of(token, True) for token in self._prompt_of(choice).tolist())
        return b"".join(data).decode(errors="replace")

    def _prompt_of(self, choice: int) -> Tokens:
        return self._plan.requests[choice // self._plan.choices].prompt

    def _chunk(
        self, choice: int, delta: Delta, words: dict[str, Any], common: dict[str, Any]
    ) -> BaseModel:
        # The type does not know that chunks before the last have no reason to finish.
        reason = cast(FinishReason, _finish_reason(delta) if delta.finish_reason else None)
        content = CompletionChoice.model_construct(
            index=choice,
            text=words.get("text", ""),
            logprobs=self._logprobs(choice, delta.tokens),
            finish_reason=reason,
        )
        return Completion.model_construct(object="text_completion", choices=[content], **common)

    def _empty_chunk(self, common: dict[str, Any]) -> BaseModel:
        return Completion(object="text_completion", choices=[], **common)

    def _answer(
        self, choices: Iterable[tuple[int, _Collected]], common: dict[str, Any]
    ) -> BaseModel:
        return Completion(
            object="text_completion",
            choices=[self._choice(index, collected) for index, collected in choices],
            **common,
        )

    def _choice(self, index: int, collected: _Collected) -> CompletionChoice:
        scores: dict[str, Any] = {}
        if self._plan.shows_scores:
            scores = {"prompt_logprobs": self._prompt_logprobs(index // self._plan.choices)}
        return CompletionChoice(
            index=index,
            text=self._echo(index) + "".join(collected.text),
            logprobs=self._logprobs(index, collected.tokens),
            finish_reason=collected.finish_reason,
            **scores,
        )

    def _logprobs(self, choice: int, tokens: Iterable[ChosenToken]) -> Logprobs | None:
        if not self._with_logprobs:
            return None
        before = self._scores_before(choice)
        every = [*before, *tokens]
        names = [self._texts.exact_name(chosen.token_id) for chosen in every]
        shown = [True] * len(before) + [self._shows_control] * (len(every) - len(before))
        # The type does not know that a prompt's first token has none.
        return Logprobs.model_construct(
            text_offset=[
                self._offsets[choice].pass_by(self._texts.bytes_of(chosen.token_id, is_shown))
                for chosen, is_shown in zip(every, shown, strict=True)
            ],
            token_logprobs=[_or_none(chosen.logprob) for chosen in every],
            tokens=names,
            top_logprobs=[
                None if math.isnan(chosen.logprob) else {**self._best(chosen), name: chosen.logprob}
                for name, chosen in zip(names, every, strict=True)
            ],
        )

    def _best(self, chosen: ChosenToken) -> dict[str, float]:
        return {self._texts.exact_name(top.token_id): top.logprob for top in chosen.top}

    def _scores_before(self, choice: int) -> list[ChosenToken]:
        """Those of the prompt, once, where it is echoed."""
        if choice not in self._echoed or choice in self._scored:
            return []
        self._scored.add(choice)
        first = ChosenToken(int(self._prompt_of(choice)[0]), math.nan)
        scores = self._scores[choice // self._plan.choices]
        return [first, *(each.chosen for each in scores)]


def _or_none(logprob: float) -> float | None:
    return None if math.isnan(logprob) else logprob


class _TextOffset:
    """Characters of a choice so far; a token that begins inside one counts from its start."""

    def __init__(self) -> None:
        self._characters = 0
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def pass_by(self, data: bytes) -> int:
        """Where a token with these bytes begins."""
        begins = self._characters
        self._characters += len(self._decoder.decode(data))
        return begins


def _content_of(pieces: Iterable[Piece]) -> str:
    return "".join(piece.text for piece in pieces if isinstance(piece, Content))


def _call_deltas(pieces: Iterable[Piece]) -> list[ChoiceDeltaToolCall]:
    """What pieces add to the calls of an answer, each call once."""
    calls: dict[int, ChoiceDeltaToolCall] = {}
    for piece in pieces:
        match piece:
            case CallBegun(index=index, id=name, name=function):
                calls[index] = ChoiceDeltaToolCall(
                    index=index,
                    id=name,
                    type="function",
                    function=ChoiceDeltaToolCallFunction(name=function, arguments=""),
                )
            case Arguments(index=index, text=text):
                if index not in calls:
                    more = ChoiceDeltaToolCallFunction(arguments="")
                    calls[index] = ChoiceDeltaToolCall(index=index, function=more)
                function = calls[index].function
                assert function is not None
                function.arguments = f"{function.arguments}{text}"
    return list(calls.values())


def _whole_calls(pieces: Iterable[Piece]) -> list[ChatCompletionMessageFunctionToolCall]:
    return [
        ChatCompletionMessageFunctionToolCall.model_validate(call.model_dump(exclude={"index"}))
        for call in _call_deltas(pieces)
    ]


def _with_calls(reason: FinishReason, num_calls: int) -> Literal["stop", "length", "tool_calls"]:
    """Why a choice ended that has so many calls in it."""
    return "tool_calls" if reason == "stop" and num_calls else reason


def _finish_reason(delta: Delta) -> FinishReason:
    return "length" if delta.finish_reason == "length" else "stop"
