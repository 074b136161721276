"""Tiny random Qwen2 checkpoints, and an oracle that shares nothing with the engine."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

from longreach.engine.model.config import ModelConfig
from longreach.kernels.dual_chunk import reference

DUAL_CHUNK = {"chunk_size": 200, "local_size": 77, "original_max_position_embeddings": 200}
"""A stride of 123 on purpose: chunks straddle blocks of 128."""

VOCAB = 97


def make_checkpoint(
    folder: Path,
    dual_chunk: dict[str, int] | None = None,
    sparse: tuple[int, int] | None = None,
    heads: int = 4,
    kv_heads: int = 2,
    layers: int = 3,
    tie: bool = True,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Write a checkpoint with seeded random weights; `sparse` is (verticals, slashes) a head."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=VOCAB,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=tie,
        eos_token_id=VOCAB - 1,
        # No field of this configuration, yet part of a checkpoint's.
        **{"hidden_size": 64, "intermediate_size": 96, "head_dim": 16, **changes},
    )
    model = Qwen2ForCausalLM(config)
    for parameter in model.parameters():
        # Larger than usual, so that attention is far from uniform and errors show.
        torch.nn.init.normal_(parameter, std=0.2 if parameter.dim() > 1 else 0.5)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    path = folder / "config.json"
    written = json.loads(path.read_text())
    if dual_chunk is not None:
        written["dual_chunk_attention_config"] = dual_chunk
    path.write_text(json.dumps(written))
    if sparse is not None:
        layer = {str(head): ["vertical_and_slash", *sparse, 1.0] for head in range(heads)}
        (folder / "sparse_attention_config.json").write_text(json.dumps([layer] * layers))
    return folder


def oracle_logits(folder: Path, prompt: list[int], generated: int = 0) -> Tensor:
    """float64 [n, vocab], by the definition: whole score matrices, no cache, no chunks.

    Args:
        generated: how many of the tokens came after the prompt: each has the temperature of as many
            tokens as there were with it.
    """
    config = ModelConfig.from_folder(folder)
    weights = {name: w.double() for name, w in load_file(folder / "model.safetensors").items()}
    length = len(prompt)
    scales = torch.full((length,), config.head_dim**-0.5, dtype=torch.float64)
    if config.dual_chunk is None:
        relative = reference.plain_positions(length)
    else:
        dual = config.dual_chunk
        relative = reference.relative_positions(length, dual.chunk_size, dual.local_size)
        lengths = torch.arange(1, length + 1).clamp(min=length - generated)
        beyond = lengths.double() / dual.original_max_position_embeddings
        scales *= (0.1 * beyond.log() + 1.0).clamp(min=1.0) ** 2

    def norm(name: str, x: Tensor) -> Tensor:
        return weights[name] * x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()

    hidden = weights["model.embed_tokens.weight"][prompt]
    for number in range(config.num_layers):
        prefix = f"model.layers.{number}"
        x = norm(f"{prefix}.input_layernorm.weight", hidden)
        q, k, v = (
            (
                x @ weights[f"{prefix}.self_attn.{name}_proj.weight"].T
                + weights[f"{prefix}.self_attn.{name}_proj.bias"]
            ).view(length, -1, config.head_dim)
            for name in "qkv"
        )
        logits = reference.scores(q, k, relative, config.rope_theta, 1.0) * scales[:, None]
        attended, _ = reference.attention(logits, v)
        output = weights[f"{prefix}.self_attn.o_proj.weight"]
        hidden = hidden + attended.reshape(length, -1) @ output.T
        x = norm(f"{prefix}.post_attention_layernorm.weight", hidden)
        gate, up, down = (
            weights[f"{prefix}.mlp.{name}_proj.weight"] for name in ("gate", "up", "down")
        )
        hidden = hidden + (torch.nn.functional.silu(x @ gate.T) * (x @ up.T)) @ down.T
    head = weights.get("lm_head.weight", weights["model.embed_tokens.weight"])
    return norm("model.norm.weight", hidden) @ head.T
