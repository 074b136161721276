"""How likely a prompt's own tokens are, each after those before it."""

import torch
from torch import Tensor

from ..model.qwen2 import Qwen2
from ..model.rows import Rows

# So many rows of logits at once: at 152,064 tokens and float32, 39 MB.
_ROWS_AT_ONCE = 64
_OWN = 2


def score_width(top: int) -> int:
    """Columns of scores with so many alternatives."""
    return _OWN + 2 * top


def score_rows(model: Qwen2, normed: Rows, following: Tensor, top: int) -> Tensor:
    """Scores of the tokens that follow some rows.

    Args:
        normed: hidden states after the last norm, [n, hidden].
        following: int64 [n], the token that comes after each row.
        top: the best tokens to name beside each.

    Returns:
        float32 [n, 2 + 2 * top]: the token's log-probability; its rank, from 1; ids of the best
        tokens, best first; their log-probabilities.
    """
    scores = torch.empty(len(following), score_width(top), device=following.device)
    for start in range(0, len(following), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        logits = model.logits(normed[rows]).float()
        own = logits.gather(1, following[rows, None])
        normalizer = logits.logsumexp(1, keepdim=True)
        best = logits.topk(top, dim=1)
        scores[rows, :1] = own - normalizer
        scores[rows, 1] = (logits > own).sum(1) + 1.0
        # Ids are exact in float32: no vocabulary has 2 ** 24 tokens.
        scores[rows, _OWN : _OWN + top] = best.indices.float()
        scores[rows, _OWN + top :] = best.values - normalizer
    return scores
