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

from ...kernels.merging import merge_attention

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
    attended: Any = _DualChunkAttention.apply(*chunks, scale, first_far)
    return attended.flatten(1, 2)[:, :length]


class _DualChunkAttention(torch.autograd.Function):
    """Everything is [sequences, chunks, stride, heads, d]."""

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        intra, successive, inter, k, v, scale, first_far = arguments
        sequences, chunks = k.shape[:2]
        output, lse = _attend(_flat(intra, k, v), scale, causal=True)
        output, lse = (each.unflatten(0, (sequences, chunks)) for each in (output.float(), lse))
        if chunks > 1:
            part, part_lse = _attend(_flat(successive[:, 1:], k[:, :-1], v[:, :-1]), scale)
            shape = (sequences, chunks - 1)
            part, part_lse = part.unflatten(0, shape), part_lse.unflatten(0, shape)
            _merge(output[:, 1:], lse[:, 1:], part, part_lse)
        if chunks > first_far:
            parts = [_attend(_far(chunk, inter, k, v), scale) for chunk in range(first_far, chunks)]
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
        chunks = k.shape[1]
        dk, dv = (torch.zeros(k.shape, device=k.device) for _ in range(2))
        d_successive, d_inter = torch.zeros_like(successive), torch.zeros_like(inter)

        d_intra, part_k, part_v = _attend_backward(
            _flat(*whole), _flat(intra, k, v), ctx.scale, causal=True
        )
        dk += part_k.view_as(k)
        dv += part_v.view_as(v)
        if chunks > 1:
            part, part_k, part_v = _attend_backward(
                _flat(*(each[:, 1:] for each in whole)),
                _flat(successive[:, 1:], k[:, :-1], v[:, :-1]),
                ctx.scale,
            )
            d_successive[:, 1:] = part.view_as(successive[:, 1:])
            dk[:, :-1] += part_k.view_as(k[:, :-1])
            dv[:, :-1] += part_v.view_as(v[:, :-1])
        for chunk in range(ctx.first_far, chunks):
            part, part_k, part_v = _attend_backward(
                tuple(each[:, chunk] for each in whole), _far(chunk, inter, k, v), ctx.scale
            )
            d_inter[:, chunk] = part
            dk[:, : chunk - 1] += part_k.unflatten(1, (chunk - 1, -1))
            dv[:, : chunk - 1] += part_v.unflatten(1, (chunk - 1, -1))
        d_intra, dk, dv = d_intra.view_as(intra), dk.to(k.dtype), dv.to(v.dtype)
        return d_intra, d_successive, d_inter, dk, dv, None, None


def _flat(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Chunks of all sequences as one batch."""
    return tuple(each.flatten(0, 1) for each in tensors)


def _far(chunk: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    """Queries of a chunk, with keys and values of those that are two or more before it."""
    return q[:, chunk], k[:, : chunk - 1].flatten(1, 2), v[:, : chunk - 1].flatten(1, 2)


def _merge(output: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Put more keys into a softmax, in place: lse [..., heads, n], output [..., n, heads, d]."""
    merge_attention(output.transpose(-3, -2), lse, part.transpose(-3, -2), part_lse)


def _attend(
    inputs: tuple[Tensor, ...], scale: float, causal: bool = False
) -> tuple[Tensor, Tensor]:
    """Attention of q, k and v, [batch, n, heads, d].

    Returns:
        output, as q, and log-sum-exps, float32 [batch, heads, n].
    """
    heads_first = [each.transpose(1, 2) for each in inputs]
    if inputs[0].is_cuda:
        operation = _aten._scaled_dot_product_flash_attention
    else:
        operation = _aten._scaled_dot_product_flash_attention_for_cpu
    output, lse, *_ = operation(*heads_first, 0.0, causal, scale=scale)
    return output.transpose(1, 2), lse


def _attend_backward(
    whole: tuple[Tensor, ...], inputs: tuple[Tensor, ...], scale: float, causal: bool = False
) -> tuple[Tensor, ...]:
    """Gradients of q, k and v.

    Args:
        whole: the gradient of the whole attention's output, that output, and its log-sum-exps.
        inputs: q, k and v, [batch, n, heads, d].
    """
    gradient, output, lse = whole
    q, k, v, gradient, output = (each.transpose(1, 2) for each in (*inputs, gradient, output))
    arguments: list[Any] = [gradient, q, k, v, output, lse.contiguous()]
    if q.is_cuda:
        # Lengths do not differ, and nothing is dropped out, so that no random state is read.
        state = torch.empty(2, dtype=torch.uint64, device=q.device)
        arguments += [None, None, q.shape[2], k.shape[2], 0.0, causal, state, state]
        operation = _aten._scaled_dot_product_flash_attention_backward
    else:
        arguments += [0.0, causal]
        operation = _aten._scaled_dot_product_flash_attention_for_cpu_backward
    return tuple(each.transpose(1, 2) for each in operation(*arguments, scale=scale))
