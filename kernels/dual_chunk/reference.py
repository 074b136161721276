"""The definition of dual chunk attention, in float64 and O(n²), straight from the formula.

It shares nothing with the fast versions: no cached rotations, no segments, no softmax state.
"""

import torch
from torch import Tensor


def relative_positions(length: int, chunk_size: int, local_size: int) -> Tensor:
    """int64 [length, length]: the position difference that RoPE sees for query i and key j."""
    stride = chunk_size - local_size
    index = torch.arange(length)
    chunk, offset = index // stride, index % stride
    chunks_apart = chunk[:, None] - chunk[None, :]
    query, key = offset[:, None], offset[None, :]
    successive = torch.clamp(query + stride, max=chunk_size) - key
    relative = torch.where(chunks_apart == 0, query - key, successive)
    return torch.where(chunks_apart >= 2, chunk_size - key, relative)


def plain_positions(length: int) -> Tensor:
    """The same without dual chunks: i - j."""
    index = torch.arange(length)
    return index[:, None] - index[None, :]


def scores(q: Tensor, k: Tensor, relative: Tensor, theta: float, scale: float) -> Tensor:
    """Causal logits, float64 [heads, n, n], -inf above the diagonal.

    Args:
        q: unrotated, [n, heads, d]. k: unrotated, [n, kv_heads, d].
        relative: [n, n], from one of the functions above.
    """
    length, heads, head_dim = q.shape
    q, k = q.double(), k.double().repeat_interleave(heads // k.shape[1], dim=1)
    frequencies = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)
    q_first, q_second = q.chunk(2, dim=-1)
    k_first, k_second = k.chunk(2, dim=-1)
    logits = torch.full((heads, length, length), -torch.inf, dtype=torch.float64)
    for i in range(length):
        angle = relative[i, : i + 1, None, None].double() * frequencies
        aligned = q_first[i] * k_first[: i + 1] + q_second[i] * k_second[: i + 1]
        crossed = q_second[i] * k_first[: i + 1] - q_first[i] * k_second[: i + 1]
        # [i + 1, heads]: the real part of (q e^{i angle_q}) times the conjugate of k's.
        logits[:, i, : i + 1] = (aligned * angle.cos() - crossed * angle.sin()).sum(-1).T
    return logits * scale


def attention(logits: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of [heads, n, n] logits over v [n, kv_heads, d].

    Returns:
        output [n, heads, d] and log-sum-exp [n, heads], both float64.
    """
    heads = logits.shape[0]
    v = v.double().repeat_interleave(heads // v.shape[1], dim=1)
    output = torch.einsum("hij,jhd->ihd", logits.softmax(-1), v)
    return output, logits.logsumexp(-1).T
