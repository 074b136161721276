"""Dual chunk attention for training, with gradients, at the cost of ordinary attention.

Queries see their own chunk, the one before it and all earlier ones under three rotations. Each of
the three is attention of its own, and their softmax is put together from log-sum-exps. Backwards,
each takes the output and log-sum-exp of the whole, from which the flash kernels make exactly its
share of the gradients, as ring attention (arXiv 2310.01889) does for blocks of keys.
"""

from typing import Any

import torch
import torch.nn.functional as functional
from torch import Tensor

_aten = torch.ops.aten


def dual_chunk_attention(
    intra: Tensor,
    successive: Tensor,
    inter: Tensor,
    k: Tensor,
    v: Tensor,
    stride: int,
    scale: float,
    far_chunks: int | None = None,
) -> Tensor:
    """Causal attention of sequences that span several dual chunks.

    Args:
        intra, successive, inter: queries in their three rotations, [sequences, length, heads, d].
        k: rotated at their offset in their chunk, [sequences, length, kv_heads, d]; v likewise.
        stride: tokens in one dual chunk.
        scale: multiplies logits.
        far_chunks: only queries of so many last chunks see farther than the chunk before theirs;
            all, if not given.

    Returns:
        [sequences, length, heads, d].
    """
    length = k.shape[1]
    inputs = [intra, successive, inter, k, v]
    if length % stride:
        # What is padded comes last, so that nothing sees it.
        padding = (0, 0, 0, 0, 0, -length % stride)
        inputs = [functional.pad(each, padding) for each in inputs]
    chunks = [each.unflatten(1, (-1, stride)) for each in inputs]
    first_far = 2 if far_chunks is None else max(2, chunks[0].shape[1] - far_chunks)
    attended = _DualChunkAttention.apply(*chunks, scale, first_far)
    assert isinstance(attended, Tensor)
    return attended.flatten(1, 2)[:, :length]


class _DualChunkAttention(torch.autograd.Function):
    """Everything is [sequences, chunks, stride, heads, d]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        intra, successive, inter, k, v, scale, first_far = arguments
        sequences, chunks = k.shape[:2]
        output, lse = _attend(*(each.flatten(0, 1) for each in (intra, k, v)), scale, causal=True)
        output, lse = (each.unflatten(0, (sequences, chunks)) for each in (output.float(), lse))
        if chunks > 1:
            part, part_lse = _attend(*_successive(successive, k, v), scale)
            shape = (sequences, chunks - 1)
            part, part_lse = part.unflatten(0, shape), part_lse.unflatten(0, shape)
            _merge(output[:, 1:], lse[:, 1:], part, part_lse)
        if chunks > first_far:
            parts = [
                _attend(inter[:, chunk], *_earlier(chunk, k, v), scale)
                for chunk in range(first_far, chunks)
            ]
            part, part_lse = (torch.stack(each, 1) for each in zip(*parts, strict=True))
            _merge(output[:, first_far:], lse[:, first_far:], part, part_lse)
        output = output.to(k.dtype)
        ctx.save_for_backward(intra, successive, inter, k, v, output, lse)
        ctx.scale, ctx.first_far = scale, first_far
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        intra, successive, inter, k, v, output, lse = ctx.saved_tensors
        whole = (gradients[0], output, lse)
        dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))
        chunks = k.shape[1]

        flat = (each.flatten(0, 1) for each in (intra, k, v))
        own, own_k, own_v = _attend_backward(
            *(each.flatten(0, 1) for each in whole), *flat, ctx.scale, causal=True
        )
        dk += own_k.view_as(k)
        dv += own_v.view_as(v)

        d_successive, d_inter = torch.zeros_like(successive), torch.zeros_like(inter)
        if chunks > 1:
            part, part_k, part_v = _attend_backward(
                *(each[:, 1:].flatten(0, 1) for each in whole),
                *_successive(successive, k, v),
                ctx.scale,
            )
            d_successive[:, 1:] = part.view_as(successive[:, 1:])
            dk[:, :-1] += part_k.view_as(k[:, :-1])
            dv[:, :-1] += part_v.view_as(v[:, :-1])
        for chunk in range(ctx.first_far, chunks):
            part, part_k, part_v = _attend_backward(
                *(each[:, chunk] for each in whole),
                inter[:, chunk],
                *_earlier(chunk, k, v),
                ctx.scale,
            )
            d_inter[:, chunk] = part
            dk[:, : chunk - 1] += part_k.unflatten(1, (chunk - 1, -1))
            dv[:, : chunk - 1] += part_v.unflatten(1, (chunk - 1, -1))
        return own.view_as(intra), d_successive, d_inter, dk.to(k.dtype), dv.to(v.dtype), None, None


def _successive(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Queries of all chunks but the first with the keys and values of the chunk before."""
    return q[:, 1:].flatten(0, 1), k[:, :-1].flatten(0, 1), v[:, :-1].flatten(0, 1)


def _earlier(chunk: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of the chunks that are two or more before a chunk."""
    return k[:, : chunk - 1].flatten(1, 2), v[:, : chunk - 1].flatten(1, 2)


def _merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put more keys into a softmax, in place: lse [..., heads, n], output [..., n, heads, d]."""
    total = torch.logaddexp(lse, part_lse)
    kept, added = ((each - total).exp().transpose(-1, -2).unsqueeze(-1) for each in (lse, part_lse))
    output.mul_(kept).add_(part * added)
    lse.copy_(total)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """q [batch, n, heads, d] to the output, alike, and log-sum-exps, float32 [batch, heads, n]."""
    heads_first = [each.transpose(1, 2) for each in (q, k, v)]
    if q.is_cuda:
        operation = _aten._scaled_dot_product_flash_attention
    else:
        operation = _aten._scaled_dot_product_flash_attention_for_cpu
    output, lse, *_ = operation(*heads_first, 0.0, causal, scale=scale)
    return output.transpose(1, 2), lse


def _attend_backward(
    gradient: Tensor,
    output: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    causal: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, [batch, n, heads, d], given those of the whole attention."""
    gradient, q, k, v, output = (each.transpose(1, 2) for each in (gradient, q, k, v, output))
    inputs = (gradient, q, k, v, output, lse.contiguous())
    if q.is_cuda:
        # No cumulative lengths, and no dropout whose random state would matter.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        lengths = (None, None, q.shape[2], k.shape[2])
        gradients = _aten._scaled_dot_product_flash_attention_backward(
            *inputs, *lengths, 0.0, causal, state, state, scale=scale
        )
    else:
        gradients = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *inputs, 0.0, causal, scale=scale
        )
    return tuple(each.transpose(1, 2) for each in gradients)
