"""The definition, in PyTorch."""

import torch
from torch import Tensor


def best_tokens(logits: Tensor) -> tuple[Tensor, Tensor]:
    """As the package's."""
    wide = logits.float()
    tokens = wide.argmax(-1)
    best = wide.gather(-1, tokens[:, None])[:, 0]
    return tokens.to(torch.int32), best - wide.logsumexp(-1)
