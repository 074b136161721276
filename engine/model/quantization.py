"""How a published checkpoint keeps its linear layers in 8 bits, from its `config.json`.

Two kinds are read: `fp8` (a scale for each tensor, or for each block of 128 × 128 weights) and
`compressed-tensors` of format `float-quantized` (for each tensor, channel, or block). Both multiply
with activations that are quantized as they come, for each token, or for each 128 of its numbers
where weights have blocks. A scale that a checkpoint has for activations is not read: each token's
own is at least as good. So are none for K and V, whose pages have their own.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import CheckpointError, WeightFormatError

Layout = Literal["tensor", "channel", "block"]

_BLOCK = 128


@dataclass(frozen=True)
class Quantization:
    """Which linear layers hold e4m3, and where their scales are.

    `ignored` are names of modules that hold more than 8 bits: a whole name, its beginning or its
    last part; or patterns, which begin with "re:".
    """

    scale_name: str
    layout: Layout
    ignored: tuple[str, ...]

    def covers(self, module: str) -> bool:
        """Whether the linear layer of that name holds e4m3."""
        return not any(_names(entry, module) for entry in self.ignored)

    def scale_shapes(self, outputs: int, inputs: int) -> tuple[tuple[int, ...], ...]:
        """The shapes that scales of a matrix may have."""
        if self.layout == "tensor":
            return (), (1,)
        if self.layout == "channel":
            return (outputs, 1), (outputs,)
        return ((-(-outputs // _BLOCK), -(-inputs // _BLOCK)),)

    @classmethod
    def from_config(cls, folder: Path, raw: dict[str, Any]) -> "Quantization | None":
        """Of a checkpoint's `config.json`; None where nothing is quantized.

        Raises:
            WeightFormatError: in a way that is not served.
            CheckpointError: the description is not whole.
        """
        described = raw.get("quantization_config") or raw.get("compression_config")
        if described is None:
            return None
        method = described.get("quant_method")
        try:
            if method == "fp8":
                return _fp8(folder, described)
            if method == "compressed-tensors":
                return _compressed(folder, described)
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{folder}/config.json: quantization_config is not whole ({error!r})"
            ) from error
        raise WeightFormatError(str(folder), f"quant_method {method!r}")


def _fp8(folder: Path, described: dict[str, Any]) -> Quantization:
    kept = described.get("fmt", "e4m3")
    if kept != "e4m3":
        raise WeightFormatError(str(folder), f"fp8 in {kept}")
    # The head is converted by nobody who writes this kind.
    ignored = ["lm_head"]
    for key in ("ignored_layers", "modules_to_not_convert"):
        ignored += described.get(key) or []
    block = described.get("weight_block_size")
    if block is None:
        return Quantization("weight_scale", "tensor", tuple(ignored))
    _check_block(folder, block)
    return Quantization("weight_scale_inv", "block", tuple(ignored))


def _compressed(folder: Path, described: dict[str, Any]) -> Quantization:
    if described.get("format") != "float-quantized":
        raise WeightFormatError(str(folder), f"compressed-tensors {described.get('format')!r}")
    groups = list(described["config_groups"].values())
    if len(groups) != 1 or groups[0]["targets"] != ["Linear"]:
        raise WeightFormatError(str(folder), "compressed-tensors of several groups of layers")
    weights, activations = groups[0]["weights"], groups[0].get("input_activations")
    if weights["type"] != "float" or weights["num_bits"] != 8:
        kept = f"{weights['type']} of {weights['num_bits']} bits"
        raise WeightFormatError(str(folder), f"compressed-tensors {kept}")
    if activations is None or activations["num_bits"] != 8:
        raise WeightFormatError(str(folder), "weights of 8 bits for activations of more")
    layout = weights["strategy"]
    if layout not in ("tensor", "channel", "block"):
        raise WeightFormatError(str(folder), f"compressed-tensors with scales for each {layout}")
    if layout == "block":
        _check_block(folder, weights["block_structure"])
    return Quantization("weight_scale", layout, tuple(described.get("ignore") or ()))


def _check_block(folder: Path, block: list[int]) -> None:
    if list(block) != [_BLOCK, _BLOCK]:
        raise WeightFormatError(str(folder), f"fp8 with blocks of {' × '.join(map(str, block))}")


def _names(entry: str, module: str) -> bool:
    if entry.startswith("re:"):
        return re.match(entry.removeprefix("re:"), module) is not None
    return module == entry or module.startswith(f"{entry}.") or module.endswith(f".{entry}")
