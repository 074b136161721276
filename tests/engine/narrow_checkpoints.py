"""Quantized checkpoints, written as others publish them, and the numbers that they stand for."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

BLOCK = 128
WEIGHTS = {"num_bits": 8, "type": "float", "dynamic": False, "symmetric": True}
ACTIVATIONS = {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True}


def compressed(strategy: str, **changes: Any) -> dict[str, Any]:
    """As llm-compressor writes it."""
    block = {"block_structure": [BLOCK, BLOCK]} if strategy == "block" else {}
    group = {
        "targets": ["Linear"],
        "weights": {**WEIGHTS, "strategy": strategy, **block},
        "input_activations": ACTIVATIONS,
        **changes,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "float-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "kv_cache_scheme": None,
    }


FP8_TENSOR = {"quant_method": "fp8", "activation_scheme": "static"}
FP8_BLOCK = {
    "quant_method": "fp8",
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "weight_block_size": [BLOCK, BLOCK],
}

KINDS: dict[str, tuple[dict[str, Any], str, str]] = {
    "fp8 by tensor": (FP8_TENSOR, "tensor", "weight_scale"),
    "fp8 by block": (FP8_BLOCK, "block", "weight_scale_inv"),
    "compressed by tensor": (compressed("tensor"), "tensor", "weight_scale"),
    "compressed by channel": (compressed("channel"), "channel", "weight_scale"),
    "compressed by block": (compressed("block"), "block", "weight_scale"),
}
"""What config.json says, how scales lie, and what they are called."""


def quantize(folder: Path, kind: str, ignored: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """Round the weights of a checkpoint in place.

    Args:
        ignored: modules that stay as they are.

    Returns:
        the numbers of every tensor of a layer's products, float32.
    """
    described, layout, scale_name = KINDS[kind]
    path = folder / "model.safetensors"
    tensors = load_file(path)
    numbers: dict[str, Tensor] = {}
    for name in [name for name in tensors if name.endswith("proj.weight")]:
        module = name.removesuffix(".weight")
        if module in ignored:
            continue
        scales = _scales(tensors[name], layout)
        every = _for_each(scales, tensors[name], layout)
        tensors[name] = (tensors[name] / every).to(torch.float8_e4m3fn)
        numbers[name] = tensors[name].float() * every
        tensors[f"{module}.{scale_name}"] = scales
        if described.get("activation_scheme") == "static":
            tensors[f"{module}.input_scale"] = torch.tensor(0.5)
    save_file(tensors, path, metadata={"format": "pt"})
    config = folder / "config.json"
    whole = {**described}
    if ignored:
        key = "ignore" if "ignore" in described else "modules_to_not_convert"
        whole[key] = [*described.get(key, []), *ignored]
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": whole}))
    return numbers


def _scales(weight: Tensor, layout: str) -> Tensor:
    if layout == "tensor":
        return weight.abs().max() / 448
    if layout == "channel":
        return weight.abs().amax(1, keepdim=True) / 448
    outputs, inputs = (-(-n // BLOCK) for n in weight.shape)
    wide = torch.zeros(outputs * BLOCK, inputs * BLOCK)
    wide[: weight.shape[0], : weight.shape[1]] = weight.abs()
    return wide.view(outputs, BLOCK, inputs, BLOCK).amax((1, 3)) / 448


def _for_each(scales: Tensor, weight: Tensor, layout: str) -> Tensor:
    if layout != "block":
        return scales
    every = scales.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return every[: weight.shape[0], : weight.shape[1]]
