"""Qwen2 for training: whole batches, gradients, and dual chunk attention for long sequences.

It computes what the engine computes, and names its parameters as published checkpoints do, so that
its state is a checkpoint.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as functional
from torch import Tensor, nn

from .attention import dual_chunk_attention
from .tokenizer import VOCABULARY_SIZE


@dataclass(frozen=True)
class PocketSizes:
    """The sizes of the pocket model."""

    vocab_size: int = VOCABULARY_SIZE
    hidden_size: int = 256
    intermediate_size: int = 640
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 64
    rope_theta: float = 1e4
    rms_norm_eps: float = 1e-6
    chunk_size: int = 2048
    local_size: int = 256

    @property
    def stride(self) -> int:
        """Tokens in one dual chunk."""
        return self.chunk_size - self.local_size


class RMSNorm(nn.Module):
    """Root mean square norm, computed in float32."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self._epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        """Any shape ending in the size; the same shape in float32."""
        wide = hidden.float()
        return self.weight * wide * torch.rsqrt(wide.square().mean(-1, True) + self._epsilon)


class SelfAttention(nn.Module):
    """The projections around attention."""

    def __init__(self, sizes: PocketSizes) -> None:
        super().__init__()
        width, kv_width = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
        self.q_proj = nn.Linear(sizes.hidden_size, width)
        self.k_proj = nn.Linear(sizes.hidden_size, kv_width)
        self.v_proj = nn.Linear(sizes.hidden_size, kv_width)
        self.o_proj = nn.Linear(width, sizes.hidden_size, bias=False)


class FeedForward(nn.Module):
    """The gated MLP."""

    def __init__(self, sizes: PocketSizes) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.up_proj = nn.Linear(sizes.hidden_size, sizes.intermediate_size, bias=False)
        self.down_proj = nn.Linear(sizes.intermediate_size, sizes.hidden_size, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """[n, hidden] to [n, hidden]."""
        return self.down_proj(functional.silu(self.gate_proj(hidden)) * self.up_proj(hidden))


class Layer(nn.Module):
    """One decoder layer, in two halves around attention. Rows are all tokens of the batch."""

    def __init__(self, sizes: PocketSizes) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.self_attn = SelfAttention(sizes)
        self.post_attention_layernorm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)
        self.mlp = FeedForward(sizes)
        self._head_dim = sizes.head_dim

    def project(self, hidden: Tensor, cosine: Tensor, sine: Tensor) -> tuple[Tensor, ...]:
        """[n, hidden] to rotated q and k, and v, each [n, heads, d]."""
        normed = self.input_layernorm(hidden)
        q, k, v = (
            projection(normed).unflatten(-1, (-1, self._head_dim))
            for projection in (self.self_attn.q_proj, self.self_attn.k_proj, self.self_attn.v_proj)
        )
        return _rotate(q, cosine, sine), _rotate(k, cosine, sine), v

    def finish(self, hidden: Tensor, attended: Tensor) -> Tensor:
        """Output projection and MLP with their residuals; attended is [n, heads * d]."""
        hidden = hidden + self.self_attn.o_proj(attended)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class _Backbone(nn.Module):
    def __init__(self, sizes: PocketSizes) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(sizes.vocab_size, sizes.hidden_size)
        self.layers = nn.ModuleList(Layer(sizes) for _ in range(sizes.num_layers))
        self.norm = RMSNorm(sizes.hidden_size, sizes.rms_norm_eps)


class PocketQwen2(nn.Module):
    """The whole model; the embedding is the output head too."""

    def __init__(self, sizes: PocketSizes) -> None:
        super().__init__()
        self.sizes = sizes
        self.model = _Backbone(sizes)
        self._project, self._finish, self._turn = Layer.project, Layer.finish, _rotate
        deep = 0.02 / (2 * sizes.num_layers) ** 0.5
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                std = deep if name.endswith(("o_proj.weight", "down_proj.weight")) else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def compile_layers(self) -> None:
        """Fuse what surrounds attention; layers and batches share what is compiled, as long as a
        batch has as many tokens.
        """
        self._project, self._finish = torch.compile(Layer.project), torch.compile(Layer.finish)
        self._turn = torch.compile(_rotate)

    def forward(
        self, tokens: Tensor, temperature: float = 1.0, far_chunks: int | None = None
    ) -> Tensor:
        """Logits for every position.

        Args:
            tokens: int64 [sequences, length].
            temperature: multiplies attention logits, as long prompts will be served with.
            far_chunks: see `dual_chunk_attention`.

        Returns:
            [sequences * length, vocab].
        """
        sizes, (sequences, length) = self.sizes, tokens.shape
        positions = torch.arange(length, device=tokens.device)
        long = length > sizes.chunk_size
        if long:
            positions = positions % sizes.stride
        table = _table(sizes, positions, sequences)
        to_successive = torch.clamp(positions + sizes.stride, max=sizes.chunk_size) - positions
        to_inter = sizes.chunk_size - positions
        turns = [_table(sizes, turn, sequences) for turn in (to_successive, to_inter)]
        hidden = self.model.embed_tokens(tokens.flatten())
        scale = temperature * sizes.head_dim**-0.5
        for layer in self.model.layers:
            assert isinstance(layer, Layer)
            q, k, v = self._project(layer, hidden, *table)
            queries = [q, *(self._turn(q, *turn) for turn in turns)] if long else [q]
            *queries, k, v = (each.unflatten(0, (sequences, length)) for each in (*queries, k, v))
            if long:
                q, successive, inter = queries
                attended = dual_chunk_attention(
                    q, successive, inter, k, v, sizes.stride, scale, far_chunks
                )
            else:
                attended = _attend(queries[0], k, v, scale)
            hidden = self._finish(layer, hidden, attended.reshape(sequences * length, -1))
        return functional.linear(self.model.norm(hidden), self.model.embed_tokens.weight)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal attention: q [sequences, length, heads, d], k and v with fewer heads."""
    q, k, v = (each.transpose(1, 2) for each in (q, k, v))
    attended = functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scale, enable_gqa=True
    )
    return attended.transpose(1, 2)


def _table(sizes: PocketSizes, positions: Tensor, sequences: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of positions [length] for all tokens of a batch, [n, 1, d / 2]."""
    exponents = torch.arange(0, sizes.head_dim, 2, device=positions.device) / sizes.head_dim
    angles = positions.float()[:, None] / sizes.rope_theta**exponents
    angles = angles.repeat(sequences, 1)[:, None]
    return angles.cos(), angles.sin()


def _rotate(vectors: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    first, second = vectors.float().chunk(2, dim=-1)
    rotated = torch.cat((first * cosine - second * sine, second * cosine + first * sine), -1)
    return rotated.to(vectors.dtype)
