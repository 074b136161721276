"""Any endpoint that speaks OpenAI's protocol: what it serves, and what it is asked."""

from typing import Any

import httpx

from .prompts import TextSize, sample_text

_SECONDS_TO_SAY = 10.0
_SECONDS_TO_ANSWER = 120.0
_SAMPLE_CHARACTERS = (1_000, 3_000)


class Endpoint:
    """One endpoint. May be used by many threads at once.

    Every method that asks raises `httpx.HTTPError` where nobody answers, or not as asked.
    """

    def __init__(self, url: str, model: str | None = None, api_key: str | None = None) -> None:
        """
        Args:
            url: with or without `/v1`.
            model: the name to ask for; else the first one that the endpoint names.
        """
        self.url = url.rstrip("/").removesuffix("/v1")
        self.headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._model = model

    @property
    def model(self) -> str:
        """The name of the model that is asked."""
        if self._model is None:
            self._model = str(self._models()[0]["id"])
        return self._model

    def max_model_len(self) -> int | None:
        """Most tokens of a prompt and its answer; None where the endpoint does not say."""
        said = [each.get("max_model_len") for each in self._models() if each["id"] == self.model]
        return int(said[0]) if said and said[0] else None

    def text_size(self) -> TextSize:
        """Of prompts in this model's tokens, by the usage of two small answers.

        Every endpoint tells usage; only some have one that counts tokens.
        """
        (short, few), (long, many) = (
            (len(text), self._count(text)) for text in map(sample_text, _SAMPLE_CHARACTERS)
        )
        per_token = (long - short) / (many - few)
        return TextSize(per_token, max(0.0, few - short / per_token))

    def chat_body(self, text: str, max_tokens: int, whole: bool) -> dict[str, Any]:
        """A streamed greedy chat completion of one message.

        Args:
            whole: have all of `max_tokens`, however soon the model would end. `ignore_eos` is no
                part of OpenAI's protocol; Longreach, vLLM and SGLang know it.
        """
        return {
            "model": self.model,
            "messages": [{"role": "user", "content": text}],
            "temperature": 0,
            "max_tokens": max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            **({"ignore_eos": True} if whole else {}),
        }

    def _models(self) -> list[dict[str, Any]]:
        url = f"{self.url}/v1/models"
        answer = httpx.get(url, headers=self.headers, timeout=_SECONDS_TO_SAY)
        return answer.raise_for_status().json()["data"]

    def _count(self, text: str) -> int:
        body = self.chat_body(text, 1, whole=False)
        del body["stream"], body["stream_options"]
        answer = httpx.post(
            f"{self.url}/v1/chat/completions",
            json=body,
            headers=self.headers,
            timeout=_SECONDS_TO_ANSWER,
        )
        return int(answer.raise_for_status().json()["usage"]["prompt_tokens"])
