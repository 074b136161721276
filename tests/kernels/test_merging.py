"""Attention over two sets of keys, merged, is attention over both."""

import torch

from longreach.kernels.merging import merge_attention


def attention(logits: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return logits.softmax(-1) @ v, logits.logsumexp(-1)


def test_parts_make_the_whole() -> None:
    torch.manual_seed(0)
    logits, v = torch.randn(2, 5, 30) * 4, torch.randn(2, 30, 8)
    output, lse = torch.zeros(2, 8, 5).transpose(1, 2), torch.full((2, 5), -torch.inf)
    for keys in (slice(0, 3), slice(3, 29), slice(29, 30)):
        merge_attention(output, lse, *attention(logits[..., keys], v[:, keys]))
    whole, whole_lse = attention(logits, v)
    torch.testing.assert_close(output, whole)
    torch.testing.assert_close(lse, whole_lse)
