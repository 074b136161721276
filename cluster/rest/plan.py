"""From a parsed body to requests that the engine can start on: tokenized and within limits."""

import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from ...engine.errors import InvalidRequestError
from ...engine.messages import GenerationRequest, SamplingParameters, Tokens
from ...engine.text.tokenizer import Tokenizer, Writing
from .errors import INCONSISTENT, RestError, invalid, shown
from .limits import IngressLimits
from .middleware import is_fit_request_id
from .schemas import ChatBody, CompletionBody, GenerationBody, Message, Prompt, StreamOptions


@dataclass(frozen=True)
class Plan:
    """One HTTP request's work: a request to the engine for each prompt, and how to answer.

    The answer's choice index is prompt index × `choices` + the engine's choice. `request_id` is
    what the client and the logs call it.

    `continuous_usage`: every chunk says the usage so far. `return_progress`: the progress comes in
    events, not in comments. `clamped_to`: most tokens of an answer, where more were asked for.
    `held_by`: the field that answers are held to a form by. `calls_tools`: an answer may have calls
    of tools in it, one at most where `one_call`. `repeated`: what the answer repeats of the
    request, where its form does that. `echo`: answers begin with their prompts. `prompt_only`: no
    answer is wanted behind them. `shows_scores`: answers have their prompts' log-probabilities in a
    field of their own.
    """

    answer_id: str
    request_id: str
    arrived: float
    requests: tuple[GenerationRequest, ...]
    choices: int
    stream: bool
    include_usage: bool
    continuous_usage: bool
    return_progress: bool
    clamped_to: int | None
    held_by: str | None
    calls_tools: bool = False
    one_call: bool = False
    repeated: Mapping[str, Any] = field(default_factory=dict)
    echo: bool = False
    prompt_only: bool = False
    shows_scores: bool = False

    @property
    def grammar(self) -> str | None:
        """What answers must match."""
        return self.requests[0].sampling.grammar

    def held_to(self, grammar: str) -> "Plan":
        """The same, held to this grammar."""
        requests = (
            replace(each, sampling=replace(each.sampling, grammar=grammar))
            for each in self.requests
        )
        return replace(self, requests=tuple(requests))

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def total_choices(self) -> int:
        """Choices of all prompts together."""
        return len(self.requests) * self.choices


@dataclass(frozen=True)
class _Asked:
    """How many tokens an answer may have, and the field that says so."""

    param: str
    tokens: int | None

    @classmethod
    def of_chat(cls, body: ChatBody) -> "_Asked":
        """A chat may say it in two fields."""
        if body.max_completion_tokens is not None:
            return cls("max_completion_tokens", body.max_completion_tokens)
        return cls("max_tokens", body.max_tokens)


@contextmanager
def _blamed_on(param: str) -> Iterator[None]:
    """Say which field holds what the tokenizer refuses."""
    try:
        yield
    except InvalidRequestError as error:
        raise invalid(str(error), param, "invalid_value") from error


def _held_to(body: GenerationBody) -> tuple[str, str] | tuple[None, None]:
    """The field that answers are held by, and its grammar."""
    held_to = body.held_to()
    if len(held_to) > 1:
        first, second, *_ = held_to
        raise invalid(f"{first} and {second}: an answer has one form", second, "invalid_value")
    return next(iter(held_to.items()), (None, None))


def _scored(body: GenerationBody) -> int | None:
    """How many alternatives to the prompts' own tokens are wanted; None: these are not scored."""
    echoed = body.logprobs if isinstance(body, CompletionBody) and body.echo else None
    wanted = [each for each in (echoed, body.prompt_logprobs) if each is not None]
    return max(wanted, default=None)


def check_model(name: str, served: str) -> None:
    """Refuse a model that is not served here."""
    if name != served:
        raise RestError(
            404,
            f"the model '{shown(name)}' does not exist; this server has '{served}'",
            param="model",
            code="model_not_found",
        )


class Planner:
    """Checks everything a body asks for. Its methods compute for long: call them in a thread.

    Raises (every method):
        RestError: with what is wrong, the field it is wrong in, and the remedy.
    """

    def __init__(self, limits: IngressLimits, tokenizer: Tokenizer) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here."""
        if name is not None:
            check_model(name, self._limits.model_name)

    def check_logprobs(self, param: str, count: int | None) -> None:
        """Refuse more alternatives than are served."""
        most = self._limits.max_logprobs
        if count is not None and count > most:
            said = f"{param}: at most {most} are served, not {count}"
            raise invalid(said, param, "invalid_value")

    def chat(self, body: ChatBody, request_id: str, arrived: float) -> Plan:
        """A chat has one prompt."""
        self.check_model(body.model)
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        asked = _Asked.of_chat(body)
        self._check_limits(body, 1, top_logprobs, asked)
        prompt = self.encode_chat(body.messages, body.writing, self._limits.max_model_len)
        plan = self._plan("chatcmpl", body, [prompt], top_logprobs, asked, request_id, arrived)
        return replace(plan, calls_tools=bool(body.offered), one_call=body.one_call)

    def completion(self, body: CompletionBody, request_id: str, arrived: float) -> Plan:
        """A completion has one prompt or several."""
        self.check_model(body.model)
        # A token is generated in any case, and not shown where none is wanted.
        prompt_only = body.max_tokens == 0
        asked = _Asked("max_tokens", 1 if prompt_only else body.max_tokens)
        self._check_limits(body, len(body.prompts), body.logprobs, asked)
        most, special = self._limits.max_model_len, bool(body.parse_special)
        prompts = [self.encode(prompt, "prompt", most, special) for prompt in body.prompts]
        plan = self._plan("cmpl", body, prompts, body.logprobs, asked, request_id, arrived)
        return replace(plan, echo=bool(body.echo), prompt_only=prompt_only)

    def encode(self, prompt: Prompt, param: str, most: int, parse_special: bool = False) -> Tokens:
        """Ids of a prompt, int32 [tokens]; ids are checked, text is text throughout.

        Text of more than `most` tokens is refused before or while it is encoded.

        Args:
            parse_special: what is written as a control token becomes one.
        """
        if isinstance(prompt, str):
            if not parse_special:  # a control token may stand for any number of characters
                self._check_size(self._tokenizer.least_tokens(prompt), param, most)
            encode = (
                self._tokenizer.encode_with_control if parse_special else self._tokenizer.encode
            )
            with _blamed_on(param):
                tokens = encode(prompt, enough=most)
            return self._whole(tokens, param, most)
        return self._ids(prompt, param)

    def _ids(self, prompt: Sequence[int], param: str) -> Tokens:
        """Token ids as they were sent, int32 [tokens]."""
        with suppress(OverflowError):  # 64 bits hold less than JSON
            ids = np.fromiter(prompt, np.int64, len(prompt))
            if ((ids >= 0) & (ids < self._vocab_size)).all():
                return ids.astype(np.int32)
        wrong = next(each for each in prompt if not 0 <= each < self._vocab_size)
        raise invalid(
            f"token id {shown(str(wrong))} is out of range; "
            f"ids go from 0 to {self._vocab_size - 1}",
            param,
            "token_id_out_of_range",
        )

    def encode_chat(self, messages: Sequence[Message], writing: Writing, most: int) -> Tokens:
        """Ids of a chat, int32 [tokens]; of more than `most`, as in `encode`."""
        least = sum(self._tokenizer.least_tokens(message.content) for message in messages)
        self._check_size(least, "messages", most)
        with _blamed_on("chat_template_kwargs"):
            self._tokenizer.check_variables(writing.variables)
        if writing.tools and not self._tokenizer.takes_tools:
            raise invalid("the model's chat template has no place for tools", "tools")
        with _blamed_on("messages"):
            tokens = self._tokenizer.encode_chat(
                [message.for_template for message in messages], writing, most
            )
        return self._whole(tokens, "messages", most)

    def _check_size(self, least: int, param: str, most: int) -> None:
        if least > most:
            raise self._too_long(f"at least {least} tokens", param)

    def _whole(self, tokens: Tokens, param: str, most: int) -> Tokens:
        """The tokens, unless encoding stopped because there are too many."""
        if len(tokens) > most:
            raise self._too_long(f"more than {most} tokens", param)
        return tokens

    def _too_long(self, has: str, param: str, remedy: str = "shorten the prompt") -> RestError:
        return invalid(
            f"this model's maximum context length is {self._limits.max_model_len} tokens "
            f"(limits.max_model_len), but the prompt has {has}; {remedy}",
            param,
            "context_length_exceeded",
        )

    def _check_limits(
        self, body: GenerationBody, prompts: int, top_logprobs: int | None, asked: "_Asked"
    ) -> None:
        limits = self._limits
        if prompts > limits.max_prompts:
            raise invalid(
                f"prompt: at most {limits.max_prompts} are served in one request, not {prompts}",
                "prompt",
                "invalid_value",
            )
        if (body.n or 1) > limits.max_choices:
            raise invalid(
                f"n: at most {limits.max_choices} answers are served for a prompt, not {body.n}",
                "n",
                "invalid_value",
            )
        name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
        self.check_logprobs(name, top_logprobs)
        self.check_logprobs("prompt_logprobs", body.prompt_logprobs)
        if body.prompt_logprobs is not None and body.stream:
            raise invalid(
                "prompt_logprobs: answers that are streamed have none",
                "prompt_logprobs",
                INCONSISTENT,
            )
        too_many = asked.tokens is not None and asked.tokens > limits.max_output_tokens
        if too_many and not limits.clamp_max_tokens:
            raise invalid(
                f"{asked.param}: at most {limits.max_output_tokens} are generated for one answer, "
                f"not {asked.tokens}",
                asked.param,
                "invalid_value",
            )

    def _plan(
        self,
        kind: str,
        body: GenerationBody,
        prompts: Sequence[Tokens],
        top_logprobs: int | None,
        asked: "_Asked",
        request_id: str,
        arrived: float,
    ) -> Plan:
        options = body.stream_options or StreamOptions()
        # Clients may send one x-request-id twice, and the engine's ids must differ.
        called = body.request_id if is_fit_request_id(body.request_id or "") else request_id
        answer_id = f"{kind}-{called}-{uuid.uuid4().hex[:8]}"
        held_by, grammar = _held_to(body)
        scored = _scored(body)
        self._check_scored(scored, prompts)
        shared = {
            **self._sampling(body, top_logprobs),
            "grammar": grammar,
            "prompt_logprobs": scored,
        }
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        requests = tuple(
            GenerationRequest(
                request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{index}",
                prompt=prompt,
                sampling=SamplingParameters(
                    max_tokens=self._max_tokens(len(prompt), asked, param, body.min_tokens or 0),
                    **shared,
                ),
                arrived=arrived,
            )
            for index, prompt in enumerate(prompts)
        )
        shortest = min(request.sampling.max_tokens for request in requests)
        return Plan(
            answer_id=answer_id,
            request_id=request_id,
            arrived=arrived,
            requests=requests,
            choices=body.n or 1,
            stream=bool(body.stream),
            include_usage=bool(options.include_usage),
            continuous_usage=bool(options.continuous_usage_stats),
            return_progress=bool(body.return_progress),
            clamped_to=shortest if shortest < (asked.tokens or 0) else None,
            held_by=held_by,
            shows_scores=body.prompt_logprobs is not None,
        )

    def _check_scored(self, scored: int | None, prompts: Sequence[Tokens]) -> None:
        """Refuse more log-probabilities of prompts than there may be."""
        tokens, most = sum(map(len, prompts)), self._limits.max_scored_tokens
        if scored is not None and tokens > most:
            raise invalid(
                f"prompt: log-probabilities are given for at most {most} tokens of prompts in one "
                f"request (limits.max_scored_tokens), not for {tokens}",
                "prompt",
                "invalid_value",
            )

    def _max_tokens(self, prompt_tokens: int, asked: "_Asked", param: str, least: int) -> int:
        """What was asked for, or as many as there may be.

        Args:
            param: that holds the prompt.
            least: tokens that are asked for as well.
        """
        if prompt_tokens == 0:
            raise invalid("the prompt is empty; send at least one token", param, "empty_prompt")
        room = self._limits.max_model_len - prompt_tokens
        needed = 1 if self._limits.clamp_max_tokens else asked.tokens or 1
        if room < needed:
            has, remedy = f"{prompt_tokens} tokens", "shorten the prompt"
            if asked.tokens:
                has += f" and {asked.tokens} more were asked for"
                remedy += f" or lower {asked.param}" if room > 0 else ""
            raise self._too_long(has, param, remedy)
        allowed = min(self._limits.max_output_tokens, room)
        most = min(asked.tokens or allowed, allowed)
        if least > most:
            raise invalid(
                f"min_tokens: at most {most} are generated here, so not {least} at least",
                "min_tokens",
                INCONSISTENT,
            )
        return most

    def _sampling(self, body: GenerationBody, top_logprobs: int | None) -> dict[str, Any]:
        given: Mapping[str, Any] = {
            "temperature": body.temperature,
            "top_p": body.top_p,
            "top_k": None if body.top_k == -1 else body.top_k,
            "min_p": body.min_p,
            "seed": body.seed,
            "presence_penalty": body.presence_penalty,
            "frequency_penalty": body.frequency_penalty,
            "repetition_penalty": body.repetition_penalty,
            "logit_bias": self._logit_bias(body.logit_bias),
            "stop": None if body.stop is None else tuple(body.stop),
            "stop_token_ids": self._stop_token_ids(body.stop_token_ids),
            "ignore_eos": body.ignore_eos,
            "min_tokens": body.min_tokens,
            "top_logprobs": top_logprobs,
            "choices": body.n,
            "skip_special_tokens": body.skip_special_tokens,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _logit_bias(self, bias: Mapping[str, float] | None) -> tuple[tuple[int, float], ...] | None:
        if bias is None:
            return None
        for key in bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise invalid(f"logit_bias: '{shown(key)}' is not a token id", "logit_bias")
        self.encode([int(key) for key in bias], "logit_bias", len(bias))
        return tuple((int(key), value) for key, value in bias.items())

    def _stop_token_ids(self, ids: Sequence[int] | None) -> tuple[int, ...] | None:
        return (
            None
            if ids is None
            else tuple(map(int, self.encode([*ids], "stop_token_ids", len(ids))))
        )
