"""From a model's logits to the next token of one sequence.

In this order: the grammar's mask; logit bias; repetition, presence and frequency penalties;
temperature; top-k; top-p (of what top-k left); min-p. Temperature 0 takes the best token after the
penalties.
Log-probabilities that are reported are those of the model's own distribution, before all of it.

Every sequence is sampled alone, on the CPU, from its own counter-based generator, so the
tokens of one answer cannot depend on what else is in the batch.
"""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from ..messages import ChosenToken, SamplingParameters, TokenLogprob, Tokens
from .grammar import Mask, allowed_tokens

Logits = npt.NDArray[np.float32]

_FIRST_SORTED = 1024  # candidates sorted before top-p tries the whole vocabulary
_DAMAGED = "the model's logits are not finite; its KV pages are damaged"


def best_token(logits: Logits) -> ChosenToken:
    """The token with the highest logit, the lowest id among equals, and its log-probability.

    The latter is not finite where the logits hold NaN, or nothing but infinities.
    """
    token = int(np.argmax(logits))
    return ChosenToken(token, float(logits[token]) - _log_sum_exp(logits))


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
        self._penalties = _Penalties.of(sampling, prompt, vocab_size)
        self._bias_ids = np.array([token for token, _ in sampling.logit_bias], dtype=np.int64)
        self._bias = np.array([bias for _, bias in sampling.logit_bias], dtype=np.float32)

    @property
    def takes_best(self) -> bool:
        """Whether the best token and its log-probability are all that this sampler would look at.

        Who has found them need not bring the logits: see `accept`.
        """
        return (
            self._sampling.temperature == 0
            and self._penalties is None
            and not len(self._bias_ids)
            and not self._may_not_end
            and not self._sampling.top_logprobs
        )

    @property
    def _may_not_end(self) -> bool:
        return self._chosen < self._sampling.min_tokens and len(self._ends) > 0

    def accept(self, best: ChosenToken) -> ChosenToken:
        """Choose the next token where `takes_best`, as `choose` would.

        Args:
            best: `best_token` of the logits.

        Raises:
            FloatingPointError: as `choose`.
        """
        if not math.isfinite(best.logprob):
            raise FloatingPointError(_DAMAGED)
        self._chosen += 1
        return best

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
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.count(token)
        return ChosenToken(
            token_id=token,
            logprob=float(logits[token]) - normalizer,
            top=_top_logprobs(logits, normalizer, self._sampling.top_logprobs or 0),
        )

    def repeat(self, token: int) -> ChosenToken:
        """Choose a token that was chosen before in this place, and leave what follows as it was."""
        if self._sampling.temperature != 0:
            self._generator.random()
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.count(token)
        return ChosenToken(token, math.nan)

    def _adjusted(self, logits: Logits, allowed: Mask | None) -> Logits:
        """Logits with mask, bias and penalties, without early ends; else themselves."""
        is_changed = len(self._bias_ids) or self._penalties is not None or self._may_not_end
        if not is_changed and allowed is None:
            return logits
        adjusted = logits.copy()
        if allowed is not None:
            adjusted[~allowed_tokens(allowed, len(adjusted))] = -math.inf
            if not math.isfinite(adjusted.max()):
                raise FloatingPointError(_DAMAGED)
        np.add.at(adjusted, self._bias_ids, self._bias)
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
        best = logits.max()
        # Subtracting first keeps a tiny temperature from overflowing.
        scaled = (logits.astype(np.float64) - best) / sampling.temperature
        candidates = _kept_by_top_k_and_top_p(scaled, sampling.top_k, sampling.top_p)
        left = scaled if candidates is None else scaled[candidates]
        if sampling.min_p > 0:
            kept = np.flatnonzero(left >= math.log(sampling.min_p))
            left = left[kept]
            candidates = kept if candidates is None else candidates[kept]
        # In place: fresh memory for a whole vocabulary costs as much as the sums.
        cumulative = np.cumsum(np.exp(left, out=left), out=left)
        drawn = self._generator.random() * cumulative[-1]
        # A draw that rounds up to the total belongs to the last candidate that can come at all.
        last = int(np.searchsorted(cumulative, cumulative[-1]))
        index = min(int(np.searchsorted(cumulative, drawn, side="right")), last)
        return index if candidates is None else int(candidates[index])


class _Penalties:
    """Counts of the tokens that penalties look at, kept as tokens arrive."""

    def __init__(self, sampling: SamplingParameters, prompt: Tokens, vocab_size: int) -> None:
        self._presence = sampling.presence_penalty
        self._frequency = sampling.frequency_penalty
        self._repetition = sampling.repetition_penalty
        self._answered = np.zeros(vocab_size, dtype=np.float32)
        self._seen = np.zeros(vocab_size, dtype=np.bool_)
        self._seen[prompt] = True

    @classmethod
    def of(
        cls, sampling: SamplingParameters, prompt: Tokens, vocab_size: int
    ) -> "_Penalties | None":
        """None where no penalty is set, which is nearly always."""
        if (
            sampling.presence_penalty == 0
            and sampling.frequency_penalty == 0
            and sampling.repetition_penalty == 1
        ):
            return None
        return cls(sampling, prompt, vocab_size)

    def count(self, token: int) -> None:
        self._answered[token] += 1
        self._seen[token] = True

    def apply(self, logits: Logits) -> None:
        """Change [vocab] logits in place."""
        if self._repetition != 1:
            seen = logits[self._seen]
            logits[self._seen] = np.where(
                seen > 0, seen / self._repetition, seen * self._repetition
            )
        logits -= self._frequency * self._answered
        logits -= self._presence * (self._answered > 0)


def _kept_by_top_k_and_top_p(
    scaled: npt.NDArray[np.float64], top_k: int, top_p: float
) -> npt.NDArray[np.int64] | None:
    """Token ids left by top-k, then by top-p, best first; None for all, when both are off.

    Top-p keeps the shortest run of best tokens whose probability reaches `top_p`, at least one.
    """
    top_k = min(top_k, len(scaled))
    if top_p >= 1:
        return _best(scaled, top_k) if top_k else None
    # Sorting a whole vocabulary is slow, and its few best tokens nearly always reach top_p.
    ids = _best(scaled, top_k or _FIRST_SORTED)
    cumulative = np.cumsum(np.exp(scaled[ids]))
    target = top_p * (cumulative[-1] if top_k else np.exp(scaled).sum())
    if cumulative[-1] < target:
        ids = _best(scaled, len(scaled))
        cumulative = np.cumsum(np.exp(scaled[ids]))
    return ids[: int(np.searchsorted(cumulative, target)) + 1]


def _best(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, the lower index first among equals."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


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
        for token in _best(logits, count)
    )
