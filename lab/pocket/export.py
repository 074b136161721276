"""Writes a checkpoint folder in Hugging Face's layout."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from .model import PocketSizes
from .tokenizer import END_OF_TEXT_ID, TURN_END_ID, save_tokenizer

TRAINED_LENGTH = 2048
LOCAL_SIZE = 256
ORIGINAL_LENGTH = 131_072
"""Longer prompts sharpen attention: more for each of them finds less, and nothing for any far less
(EXPERIMENTS.md, "How much to sharpen")."""
DENSE_UP_TO = 2048
"""Longer prompts are prefilled sparsely. On CPUs that pays from about here on: in one thread 4,096
tokens take half as long, and 16,384 a third."""
CONTEXT_LENGTH = 1_114_112
"""A prompt of 2^20 tokens, and 65,536 more."""

Budgets = Sequence[Sequence[tuple[int, int]]]
"""Verticals and slashes of each head of each layer."""


def write_checkpoint(
    folder: Path, state: dict[str, Tensor], sizes: PocketSizes, budgets: Budgets
) -> None:
    """Write configuration, tokenizer, sparsity budgets and weights in bfloat16.

    Args:
        state: of a `PocketQwen2`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: each.detach().to("cpu", torch.bfloat16).clone() for name, each in state.items()
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_json(folder / "config.json", _config(sizes))
    ends = [TURN_END_ID, END_OF_TEXT_ID]
    _write_json(folder / "generation_config.json", {"do_sample": False, "eos_token_id": ends})
    write_budgets(folder, budgets)
    save_tokenizer(folder, CONTEXT_LENGTH)


def write_budgets(folder: Path, budgets: Budgets) -> None:
    """Write `sparse_attention_config.json` as published with Qwen2.5-1M."""
    layers = [
        {str(head): ["vertical_and_slash", *pair, 1.0] for head, pair in enumerate(heads)}
        for heads in budgets
    ]
    lines = ",\n".join(f"  {json.dumps(layer)}" for layer in layers)
    (folder / "sparse_attention_config.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")


def _config(sizes: PocketSizes) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "vocab_size": sizes.vocab_size,
        "hidden_size": sizes.hidden_size,
        "intermediate_size": sizes.intermediate_size,
        "num_hidden_layers": sizes.num_layers,
        "num_attention_heads": sizes.num_heads,
        "num_key_value_heads": sizes.num_kv_heads,
        "head_dim": sizes.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": sizes.rms_norm_eps,
        "rope_theta": sizes.rope_theta,
        "max_position_embeddings": CONTEXT_LENGTH,
        "dual_chunk_attention_config": {
            "chunk_size": TRAINED_LENGTH,
            "local_size": LOCAL_SIZE,
            "original_max_position_embeddings": ORIGINAL_LENGTH,
            "sparse_attention_threshold": DENSE_UP_TO,
        },
        "tie_word_embeddings": True,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "eos_token_id": TURN_END_ID,
        "pad_token_id": END_OF_TEXT_ID,
        "torch_dtype": "bfloat16",
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
