"""Prompts of an evaluation answered by an endpoint that speaks OpenAI's protocol."""

from collections.abc import Mapping, Sequence

from ...cluster.client import Endpoint, EndpointError, Message
from .answerer import Answer, Answerer, OnProgress, TokenCount

_VARIANT = "served"
_SHORT = "Well?"


class EndpointAnswerer(Answerer):
    """Asks a model behind an endpoint: Longreach's, vLLM's, or a hosted one.

    Lengths are counted by `/tokenize` where there is one (Longreach and vLLM). Elsewhere the
    endpoint counts two small prompts, and a line through them says how long others are; each
    result carries the length that the endpoint counted in the end.

    Args:
        base_url: of the endpoint, with or without `/v1`.
        model: else the first that is served.
        characters_per_token: instead of asking how long prompts are.

    Raises:
        EndpointError: nobody answers there.
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        api_key: str | None = None,
        characters_per_token: float | None = None,
    ) -> None:
        self._endpoint = Endpoint(base_url, api_key)
        self._model = model or self._endpoint.first_model()
        self._characters_per_token = characters_per_token

    @property
    def model(self) -> str:
        return self._model

    @property
    def variants(self) -> Sequence[str]:
        return (_VARIANT,)

    @property
    def settings(self) -> Mapping[str, str]:
        settings = {"endpoint": self._endpoint.base_url}
        if self._characters_per_token is not None:
            # It decides how long prompts are, and so which prompts are asked.
            settings["characters_per_token"] = str(float(self._characters_per_token))
        return settings

    def counter(self, sample: str) -> TokenCount:
        if self._characters_per_token is not None:
            ratio = self._characters_per_token
            return lambda content: round(len(content) / ratio)
        try:
            self._counted(_SHORT)
        except EndpointError:
            return self._line_through(_SHORT, sample)
        return self._counted

    def answer(
        self, variant: str, content: str, max_tokens: int, on_progress: OnProgress
    ) -> Answer:
        answer = self._endpoint.ask(self._model, _messages(content), max_tokens, on_progress)
        return Answer(answer.text, answer.prompt_tokens)

    def _counted(self, content: str) -> int:
        return self._endpoint.count_tokens(self._model, _messages(content))

    def _line_through(self, *samples: str) -> TokenCount:
        """Tokens as a linear function of characters, known at two samples."""
        short, long = (
            (len(sample), self.answer(_VARIANT, sample, 1, lambda _: None).prompt_tokens)
            for sample in samples
        )
        slope = (long[1] - short[1]) / (long[0] - short[0])
        return lambda content: round(short[1] + slope * (len(content) - short[0]))


def _messages(content: str) -> list[Message]:
    return [{"role": "user", "content": content}]
