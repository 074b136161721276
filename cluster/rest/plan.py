"""From a parsed body to requests that the engine can start on: tokenized and within limits."""

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...engine.messages import GenerationRequest, SamplingParameters, Tokens
from ...engine.text.tokenizer import Tokenizer
from .errors import RestError, invalid
from .limits import IngressLimits
from .schemas import ChatBody, CompletionBody, GenerationBody, Prompt


@dataclass(frozen=True)
class Plan:
    """One HTTP request's work: a request to the engine for each prompt, and how to answer.

    The answer's choice index is prompt index × `choices` + the engine's choice.
    """

    answer_id: str
    arrived: float
    requests: tuple[GenerationRequest, ...]
    choices: int
    stream: bool
    include_usage: bool

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts together."""
        return sum(len(request.prompt) for request in self.requests)

    @property
    def total_choices(self) -> int:
        """Choices of all prompts together."""
        return len(self.requests) * self.choices


class Planner:
    """Checks everything a body asks for. Its methods compute for long: call them in a thread.

    Raises (every method):
        RestError: with what is wrong and the remedy.
        InvalidRequestError: the text or the chat cannot be encoded.
    """

    def __init__(self, limits: IngressLimits, tokenizer: Tokenizer) -> None:
        self._limits = limits
        self._tokenizer = tokenizer
        self._vocab_size = tokenizer.vocab_size

    def check_model(self, name: str | None) -> None:
        """Refuse a model that is not served here."""
        if name is not None and name != self._limits.model_name:
            raise RestError(
                404,
                f"the model '{name}' does not exist; this server has '{self._limits.model_name}'",
                param="model",
                code="model_not_found",
            )

    def chat(self, body: ChatBody, arrived: float) -> Plan:
        """A chat has one prompt."""
        self.check_model(body.model)
        top_logprobs = (body.top_logprobs or 0) if body.logprobs else None
        max_tokens = body.max_completion_tokens or body.max_tokens
        self._check_limits(body, 1, top_logprobs, max_tokens)
        prompt = self._tokenizer.encode_chat([message.for_template for message in body.messages])
        return self._plan("chatcmpl", body, [prompt], top_logprobs, max_tokens, arrived)

    def completion(self, body: CompletionBody, arrived: float) -> Plan:
        """A completion has one prompt or several."""
        self.check_model(body.model)
        self._check_limits(body, len(body.prompts), body.logprobs, body.max_tokens)
        prompts = [self.encode(prompt, "prompt") for prompt in body.prompts]
        return self._plan("cmpl", body, prompts, body.logprobs, body.max_tokens, arrived)

    def encode(self, prompt: Prompt, param: str) -> Tokens:
        """Ids of a prompt, int32 [tokens]; ids are checked, text is text throughout."""
        if isinstance(prompt, str):
            return self._tokenizer.encode(prompt)
        lowest, highest = min(prompt, default=0), max(prompt, default=0)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise invalid(
                f"token id {wrong} is out of range; ids go from 0 to {self._vocab_size - 1}",
                param,
                "token_id_out_of_range",
            )
        return np.array(prompt, dtype=np.int32)

    def _check_limits(
        self,
        body: GenerationBody,
        prompts: int,
        top_logprobs: int | None,
        max_tokens: int | None,
    ) -> None:
        limits = self._limits
        choices = prompts * (body.n or 1)
        if choices > limits.max_choices:
            raise invalid(
                f"{prompts} prompts with n = {body.n or 1} are {choices} answers; "
                f"at most {limits.max_choices} are served at once",
                "n",
                "invalid_value",
            )
        if top_logprobs is not None and top_logprobs > limits.max_logprobs:
            name = "top_logprobs" if isinstance(body, ChatBody) else "logprobs"
            raise invalid(
                f"{name}: at most {limits.max_logprobs} are served, not {top_logprobs}",
                name,
                "invalid_value",
            )
        if max_tokens is not None and max_tokens > limits.max_output_tokens:
            raise invalid(
                f"max_tokens: at most {limits.max_output_tokens} are generated for one answer, "
                f"not {max_tokens}",
                "max_tokens",
                "invalid_value",
            )

    def _plan(
        self,
        kind: str,
        body: GenerationBody,
        prompts: Sequence[Tokens],
        top_logprobs: int | None,
        max_tokens: int | None,
        arrived: float,
    ) -> Plan:
        answer_id = f"{kind}-{uuid.uuid4().hex}"
        shared = self._sampling(body, top_logprobs)
        param = "messages" if isinstance(body, ChatBody) else "prompt"
        requests = tuple(
            GenerationRequest(
                request_id=answer_id if len(prompts) == 1 else f"{answer_id}-{index}",
                prompt=prompt,
                sampling=SamplingParameters(
                    max_tokens=self._max_tokens(len(prompt), max_tokens, param), **shared
                ),
                arrived=arrived,
            )
            for index, prompt in enumerate(prompts)
        )
        return Plan(
            answer_id=answer_id,
            arrived=arrived,
            requests=requests,
            choices=body.n or 1,
            stream=bool(body.stream),
            include_usage=bool(body.stream_options and body.stream_options.include_usage),
        )

    def _max_tokens(self, prompt_tokens: int, asked: int | None, param: str) -> int:
        """What was asked for if it fits, else as many as fit."""
        if prompt_tokens == 0:
            raise invalid("the prompt is empty; send at least one token", param, "empty_prompt")
        most = self._limits.max_model_len
        room = most - prompt_tokens
        if room < (asked or 1):
            also = f" and {asked} more were asked for" if asked else ""
            raise invalid(
                f"this model's maximum context length is {most} tokens "
                f"(limits.max_model_len), but the prompt has {prompt_tokens} tokens{also}; "
                "shorten the prompt" + (" or max_tokens" if asked and room > 0 else ""),
                param,
                "context_length_exceeded",
            )
        return asked or min(self._limits.max_output_tokens, room)

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
            "top_logprobs": top_logprobs,
            "choices": body.n,
        }
        return {name: value for name, value in given.items() if value is not None}

    def _logit_bias(self, bias: Mapping[str, float] | None) -> tuple[tuple[int, float], ...] | None:
        if bias is None:
            return None
        for key in bias:
            if not (key.isascii() and key.isdigit() and len(key) < 10):
                raise invalid(f"logit_bias: '{key}' is not a token id", "logit_bias")
        self.encode([int(key) for key in bias], "logit_bias")
        return tuple((int(key), value) for key, value in bias.items())

    def _stop_token_ids(self, ids: Sequence[int] | None) -> tuple[int, ...] | None:
        return None if ids is None else tuple(map(int, self.encode([*ids], "stop_token_ids")))
