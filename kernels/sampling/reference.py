"""The definition, for one row on the host.

In this order: mask; bias; repetition, frequency and presence penalties; temperature; top-k; top-p
(of what top-k left); min-p. What is left is drawn from in the order of ids: the token at which the
sum of weights exceeds the draw's part of all of them.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from .rows import MASKED, PENALIZED, Adjustments, RowInputs

Logits = npt.NDArray[np.float32]

_FIRST_SORTED = 1024  # candidates sorted before top-p tries the whole vocabulary


def draw_token(
    logits: Logits, draw: float, temperature: float, top_k: int, top_p: float, min_p: float
) -> int:
    """A token of adjusted logits [vocab].

    Args:
        draw: uniform in [0, 1).
        temperature: more than 0.
        top_k: 0 for all.
    """
    best = logits.max()
    # Subtracting first keeps a tiny temperature from overflowing.
    scaled = (logits.astype(np.float64) - best) / temperature
    candidates = _kept_by_top_k_and_top_p(scaled, top_k, top_p)
    left = scaled if candidates is None else scaled[candidates]
    if min_p > 0:
        kept = np.flatnonzero(left >= math.log(min_p))
        left = left[kept]
        candidates = kept if candidates is None else candidates[kept]
    # In place: fresh memory for a whole vocabulary costs as much as the sums.
    cumulative = np.cumsum(np.exp(left, out=left), out=left)
    drawn = draw * cumulative[-1]
    # A draw that rounds up to the total belongs to the last candidate that can come at all.
    last = int(np.searchsorted(cumulative, cumulative[-1]))
    index = min(int(np.searchsorted(cumulative, drawn, side="right")), last)
    return index if candidates is None else int(candidates[index])


def penalize(
    logits: Logits,
    answered: npt.NDArray[np.float32],
    seen: npt.NDArray[np.bool_],
    repetition: float,
    frequency: float,
    presence: float,
) -> None:
    """Change [vocab] logits in place."""
    if repetition != 1:
        values = logits[seen]
        logits[seen] = np.where(values > 0, values / repetition, values * repetition)
    logits -= frequency * answered
    logits -= presence * (answered > 0)


def best_tokens(values: npt.NDArray[np.floating], count: int) -> npt.NDArray[np.int64]:
    """Indices of the `count` largest values, largest first, the lower index first among equals."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        candidates = np.flatnonzero(values >= threshold)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")][:count]


def allowed_by(mask: npt.NDArray[np.int32], vocab: int) -> npt.NDArray[np.bool_]:
    """Of each token, whether its bit is 1."""
    return np.unpackbits(mask.view(np.uint8), bitorder="little")[:vocab].astype(np.bool_)


def sample(logits: Tensor, rows: RowInputs, adjustments: Adjustments) -> tuple[Tensor, Tensor]:
    """As the package's, one row after the other."""
    wide = logits.float()
    tokens = torch.empty(len(logits), dtype=torch.int32)
    for row, values in enumerate(wide.cpu().numpy()):
        asked = rows.storage[row].tolist()
        tokens[row] = _token(values.copy(), asked, adjustments, row)
    chosen = wide.gather(-1, tokens.long().to(wide.device)[:, None])[:, 0]
    return tokens.to(logits.device), chosen - wide.logsumexp(-1)


def _token(logits: Logits, asked: list[float], adjustments: Adjustments, row: int) -> int:
    temperature, top_k, top_p, min_p, draw, flags, repetition, frequency, presence, *rest = asked
    if int(flags) & MASKED:
        mask: npt.NDArray[Any] = adjustments.mask[row].cpu().numpy()
        logits[~allowed_by(mask, len(logits))] = -np.inf
    if int(flags) & PENALIZED:
        newest = int(rest[0])
        if newest >= 0:
            adjustments.answered[row, newest] = rest[1]
            adjustments.seen[row, newest] = 1
        logits += adjustments.bias[row].cpu().numpy()
        answered, seen = (
            each[row].cpu().numpy() for each in (adjustments.answered, adjustments.seen)
        )
        penalize(logits, answered, seen > 0, repetition, frequency, presence)
    if not np.isfinite(logits.max()):
        return 0
    return draw_token(logits, draw, temperature, int(top_k), top_p, min_p)


def _kept_by_top_k_and_top_p(
    scaled: npt.NDArray[np.float64], top_k: int, top_p: float
) -> npt.NDArray[np.int64] | None:
    """Token ids left by top-k, then by top-p, rising; None for all, when both are off.

    Top-p keeps the shortest run of best tokens whose probability reaches `top_p`, at least one.
    """
    top_k = min(top_k, len(scaled))
    if top_p >= 1:
        return np.sort(best_tokens(scaled, top_k)) if top_k else None
    # Sorting a whole vocabulary is slow, and its few best tokens nearly always reach top_p.
    ids = best_tokens(scaled, top_k or _FIRST_SORTED)
    cumulative = np.cumsum(np.exp(scaled[ids]))
    target = top_p * (cumulative[-1] if top_k else np.exp(scaled).sum())
    if cumulative[-1] < target:
        ids = best_tokens(scaled, len(scaled))
        cumulative = np.cumsum(np.exp(scaled[ids]))
    return np.sort(ids[: int(np.searchsorted(cumulative, target)) + 1])
