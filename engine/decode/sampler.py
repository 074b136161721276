"""From a model's logits to the next token of one sequence.

In this order: the grammar's mask; logit bias; repetition, presence and frequency penalties;
temperature; top-k; top-p (of what top-k left); min-p. Temperature 0 takes the best token after the
penalties.
Log-probabilities that are reported are those of the model's own distribution, before all of it.

Every sequence is sampled alone, by draws from its own counter-based generator, so the tokens of one
answer cannot depend on what else is in the batch. What is drawn is defined in `kernels.sampling`:
here it is done on the host, and a GPU's step does it where the logits are, by the same draws.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ...kernels.sampling.reference import best_tokens, draw_token, penalize
from ..messages import ChosenToken, SamplingParameters, TokenLogprob, Tokens
from .grammar import Mask, allowed_tokens

Logits = npt.NDArray[np.float32]

_DAMAGED = "the model's logits are not finite; its KV pages are damaged"


def best_token(logits: Logits) -> ChosenToken:
    """The token with the highest logit, the lowest id among equals, and its log-probability.

    The latter is not finite where the logits hold NaN, or nothing but infinities.
    """
    token = int(np.argmax(logits))
    return ChosenToken(token, float(logits[token]) - _log_sum_exp(logits))


@dataclass(frozen=True, eq=False)
class Drawing:
    """How a device that has the logits chooses a row's next token; see `kernels.sampling`.

    `top_k` 0 is off. `draw` is uniform in [0, 1). `penalties` None means none, and no bias.
    `allowed` waits for the mask of tokens to choose from; None for all. It raises GrammarError
    where there are none.
    """

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    draw: float
    penalties: "Penalties | None"
    allowed: Callable[[], Mask] | None = None


class Sampler:
    """Chooses the tokens of one choice of one request, and counts them for the penalties.

    Choice i of a request draws from a generator seeded with (seed, i): the same seed gives the
    same answers in any process, and different choices differ.

    Args:
        ends: tokens that end an answer; none is chosen before there are `min_tokens` others.
    """

    def __init__(
        self,
        sampling: SamplingParameters,
        seed: int,
        choice: int,
        prompt: Tokens,
        vocab_size: int,
        ends: Sequence[int] = (),
    ) -> None:
        self._sampling = sampling
        self._ends = np.array(ends, dtype=np.int64)
        self._chosen = 0
        entropy = np.random.SeedSequence([seed % 2**64, choice])
        self._generator = np.random.Generator(np.random.Philox(entropy))
        self._penalties = Penalties.of(sampling, prompt, vocab_size)
        self._pending: float | None = None

    @property
    def takes_best(self) -> bool:
        """Whether the best token and its log-probability are all that this sampler would look at.

        Who has found them need not bring the logits: see `accept`.
        """
        return (
            self._sampling.temperature == 0
            and self._penalties is None
            and not self._may_not_end
            and not self._sampling.top_logprobs
        )

    @property
    def drawing(self) -> Drawing | None:
        """How a device that has the logits would choose the next token; see `accept`.

        None where it cannot: alternatives are wanted, or an end would come too early.
        """
        sampling = self._sampling
        if self._may_not_end or sampling.top_logprobs:
            return None
        if sampling.temperature == 0:
            return Drawing(1.0, 1, 1.0, 0.0, 0.0, self._penalties)
        return Drawing(
            sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p,
            self._next_draw(), self._penalties,
        )  # fmt: skip

    @property
    def _may_not_end(self) -> bool:
        return self._chosen < self._sampling.min_tokens and len(self._ends) > 0

    def accept(self, chosen: ChosenToken) -> ChosenToken:
        """Take what was chosen elsewhere, as `choose` would have, and count it.

        Args:
            chosen: `best_token` of the logits where `takes_best`, or what a device chose by the
                `drawing`.

        Raises:
            FloatingPointError: as `choose`.
        """
        if not math.isfinite(chosen.logprob):
            raise FloatingPointError(_DAMAGED)
        self._count(chosen.token_id)
        return chosen

    def choose(self, logits: Logits, allowed: Mask | None = None) -> ChosenToken:
        """Choose the next token, and count it.

        Args:
            logits: [vocab] float32; left unchanged.
            allowed: the tokens to choose from, at least one; None for all.

        Raises:
            FloatingPointError: the logits hold NaN, or nothing but infinities, or those of all
                allowed tokens are infinite.
        """
        normalizer = _log_sum_exp(logits)
        if not math.isfinite(normalizer):
            raise FloatingPointError(_DAMAGED)
        token = self._sample(self._adjusted(logits, allowed))
        self._count(token)
        return ChosenToken(
            token_id=token,
            logprob=float(logits[token]) - normalizer,
            top=_top_logprobs(logits, normalizer, self._sampling.top_logprobs or 0),
        )

    def repeat(self, token: int) -> ChosenToken:
        """Choose a token that was chosen before in this place, and leave what follows as it was."""
        self._count(token)
        return ChosenToken(token, math.nan)

    def _next_draw(self) -> float:
        """The same until a token is counted."""
        if self._pending is None:
            self._pending = self._generator.random()
        return self._pending

    def _count(self, token: int) -> None:
        """A token was chosen; where that took a draw, the next one takes another."""
        if self._sampling.temperature != 0:
            self._next_draw()
        self._pending = None
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.count(token)

    def _adjusted(self, logits: Logits, allowed: Mask | None) -> Logits:
        """Logits with mask, bias and penalties, without early ends; else themselves."""
        is_changed = self._penalties is not None or self._may_not_end
        if not is_changed and allowed is None:
            return logits
        adjusted = logits.copy()
        if allowed is not None:
            adjusted[~allowed_tokens(allowed, len(adjusted))] = -math.inf
            if not math.isfinite(adjusted.max()):
                raise FloatingPointError(_DAMAGED)
        if self._penalties is not None:
            self._penalties.apply(adjusted)
        if self._may_not_end:
            ends = adjusted[self._ends]
            adjusted[self._ends] = -math.inf
            if not math.isfinite(adjusted.max()):
                adjusted[self._ends] = ends  # the grammar allows no other token
        return adjusted

    def _sample(self, logits: Logits) -> int:
        sampling = self._sampling
        if sampling.temperature == 0:
            return int(np.argmax(logits))
        return draw_token(
            logits, self._next_draw(), sampling.temperature, sampling.top_k, sampling.top_p,
            sampling.min_p,
        )  # fmt: skip


class Penalties:
    """A request's bias, and counts of the tokens that penalties look at, kept as tokens arrive.

    `newest` is the token that was counted last, -1 before the first, and `total` how many were.
    """

    def __init__(self, sampling: SamplingParameters, prompt: Tokens, vocab_size: int) -> None:
        self.presence = sampling.presence_penalty
        self.frequency = sampling.frequency_penalty
        self.repetition = sampling.repetition_penalty
        self.answered = np.zeros(vocab_size, dtype=np.float32)
        self.seen = np.zeros(vocab_size, dtype=np.bool_)
        self.seen[prompt] = True
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)
        self.newest, self.total = -1, 0

    @classmethod
    def of(
        cls, sampling: SamplingParameters, prompt: Tokens, vocab_size: int
    ) -> "Penalties | None":
        """None where neither is set, which is nearly always."""
        if (
            sampling.presence_penalty == 0
            and sampling.frequency_penalty == 0
            and sampling.repetition_penalty == 1
            and not sampling.logit_bias
        ):
            return None
        return cls(sampling, prompt, vocab_size)

    def bias(self) -> Logits:
        """Of every token, float32 [vocab]."""
        every = np.zeros_like(self.answered)
        np.add.at(every, self._bias_ids, self._bias)
        return every

    def count(self, token: int) -> None:
        self.answered[token] += 1
        self.seen[token] = True
        self.newest = token
        self.total += 1

    def apply(self, logits: Logits) -> None:
        """Change [vocab] logits in place."""
        np.add.at(logits, self._bias_ids, self._bias)
        penalize(logits, self.answered, self.seen, self.repetition, self.frequency, self.presence)


def _log_sum_exp(logits: Logits) -> float:
    best = float(logits.max())
    if not math.isfinite(best):
        return best
    return best + math.log(np.exp(logits - best).sum(dtype=np.float64))


def _top_logprobs(logits: Logits, normalizer: float, count: int) -> tuple[TokenLogprob, ...]:
    if count == 0:
        return ()
    return tuple(
        TokenLogprob(int(token), float(logits[token]) - normalizer)
        for token in best_tokens(logits, count)
    )
