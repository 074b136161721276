"""What travels between the ingress, the decode replica and the prefill gang.

Everything here is frozen and small, and pickles; prompts are int32 arrays so that Ray can
hand a million tokens over without touching them one by one.
"""

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt

Tokens = npt.NDArray[np.int32]


@dataclass(frozen=True)
class SamplingParameters:
    """How to choose tokens, with OpenAI's meanings. Ranges are checked at the edge.

    `temperature` 0 is greedy. `top_k` 0 and `min_p` 0 are off. `max_tokens` counts each choice.
    `top_logprobs` None means no log-probabilities; 0 means only the chosen token's.
    No end token is chosen among the first `min_tokens`, and no stop string is looked for in them.
    Penalties count tokens of the answer only (repetition penalty: prompt as well, as vLLM does).
    `grammar` is what the answer must match; see `decode.grammar`. `prompt_logprobs`: the prompt's
    own tokens are scored, with so many alternatives for each; None: they are not. Without
    `skip_special_tokens` the text has control tokens in it, but for the one that ends it.
    """

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    top_logprobs: int | None = None
    choices: int = 1
    grammar: str | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool = True

    def seeded(self) -> "SamplingParameters":
        """The same, with a seed where there is none: all that is drawn can be drawn again."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(64))


@dataclass(frozen=True)
class GenerationRequest:
    """One request, tokenized and validated. `arrived` is time.time() at the ingress.

    A later attempt at a request has the `origin` of the first, which is its id. `replayed` are
    tokens of each choice that the client has from an earlier attempt: they are generated again,
    whatever the logits say, and not delivered again. `computed` tokens of the prompt have been
    computed before, wherever their pages are now.
    """

    request_id: str
    prompt: Tokens
    sampling: SamplingParameters
    arrived: float
    replayed: tuple[tuple[int, ...], ...] = ()
    first_id: str | None = None
    computed: int = 0

    @property
    def origin(self) -> str:
        """The id of the first attempt."""
        return self.first_id or self.request_id


@dataclass(frozen=True)
class Progress:
    """Prefill has finished `done` of `total` prompt tokens."""

    done: int
    total: int


@dataclass(frozen=True)
class TokenLogprob:
    """Natural log-probability of one token, from the model's distribution before temperature."""

    token_id: int
    logprob: float


@dataclass(frozen=True)
class ChosenToken:
    """One generated token, with the alternatives asked for, best first."""

    token_id: int
    logprob: float
    top: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class Delta:
    """New text of one choice.

    `text` may be empty while bytes of a character, or a possible stop string, are held back.
    `tokens` are those sampled since the last delta of this choice. `finish_reason` is "stop" or
    "length" on the choice's last delta and None before.
    """

    choice: int
    text: str
    tokens: tuple[ChosenToken, ...] = ()
    finish_reason: str | None = None


@dataclass(frozen=True)
class Timings:
    """Where the time to the first token went, in seconds.

    queued: until prefill began. prefill: until the last chunk was computed. hand_off: from there
    until every page lay in the decode replica. first_token: from there until it was sampled.
    served: from when the decode replica took the request until its last token.
    """

    queued: float
    prefill: float
    hand_off: float
    first_token: float
    served: float
    prefill_stages: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Prefilled:
    """What a prefill gang's work ends with, when every page lies in the decode replica.

    `logits` are those after the prompt's last token, [vocab]. `scores`, where they were asked for,
    are those of `prefill.scores`, a row for each token of the prompt but the first.
    """

    logits: npt.NDArray[np.float32]
    queued: float
    prefill: float
    hand_off: float
    stages: dict[str, float]
    scores: npt.NDArray[np.float32] | None = None


@dataclass(frozen=True)
class Finished:
    """The last event of a request that ended well."""

    prompt_tokens: int
    completion_tokens: int
    timings: Timings


@dataclass(frozen=True)
class ScoredToken:
    """A token of a prompt, with its rank among all that might have come there, from 1."""

    chosen: ChosenToken
    rank: int


@dataclass(frozen=True)
class PromptScores:
    """How likely the tokens of a prompt are, all but its first; before the answer's first delta."""

    values: npt.NDArray[np.float32]

    def tokens(self, prompt: Tokens) -> Iterator[ScoredToken]:
        """The tokens of this prompt, from its second on."""
        top = (self.values.shape[1] - 2) // 2
        for token, row in zip(prompt[1:].tolist(), self.values.tolist(), strict=True):
            best = zip(row[2 : 2 + top], row[2 + top :], strict=True)
            others = tuple(TokenLogprob(int(each), logprob) for each, logprob in best)
            yield ScoredToken(ChosenToken(token, row[0], others), int(row[1]))


Event = Progress | PromptScores | Delta | Finished
