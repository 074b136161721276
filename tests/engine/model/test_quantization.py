"""Weights of 8 bits: checkpoints as they are published, and those that are rounded as they load."""

import json
import shutil
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.engine.errors import (
    CheckpointError,
    DividedBlockError,
    NarrowComputeError,
    WeightFormatError,
)
from longreach.engine.local import LocalPrefill
from longreach.engine.model.config import ModelConfig, WeightFormat
from longreach.engine.model.layer import Layer
from longreach.engine.model.linear import Linear, NarrowLinear, WideLinear
from longreach.engine.model.quantization import Quantization
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels.narrow.reference import widened

from ..checkpoints import DUAL_CHUNK, make_checkpoint, oracle_logits
from ..narrow_checkpoints import ACTIVATIONS, KINDS, WEIGHTS, compressed, quantize

CPU = torch.device("cpu")
SIZES: dict[str, Any] = {"hidden_size": 128, "intermediate_size": 512, "head_dim": 64}
PROMPT = (np.arange(300, dtype=np.int32) * 7) % 90

every_kind = pytest.mark.parametrize("kind", list(KINDS))


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four heads of 64 on two KV heads: whole blocks on one rank and on two."""
    folder = tmp_path_factory.mktemp("original")
    return make_checkpoint(folder, DUAL_CHUNK, tie=False, heads=8, kv_heads=4, **SIZES)


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def load(
    folder: Path, mesh: Mesh | None = None, weights: WeightFormat = "auto", dtype=torch.float32
) -> Qwen2:
    return Qwen2.load(folder, mesh or Mesh.single(), dtype, CPU, weights)


def change(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def numbers_of(linear: Linear) -> Tensor:
    if isinstance(linear, WideLinear):
        return linear.weight.float()
    assert isinstance(linear, NarrowLinear)
    return widened(linear.weight, linear.scales)


def products(layer: Layer) -> tuple[Linear, ...]:
    return layer.qkv, layer.output, layer.gate_up, layer.down


@every_kind
@pytest.mark.parametrize("ranks", [1, 2])
def test_every_rank_gets_the_numbers_that_were_published(
    folder: Path, kind: str, ranks: int
) -> None:
    numbers = quantize(folder, kind)

    def part(name: str, rank: int, axis: int = 0) -> Tensor:
        return numbers[f"model.layers.2.{name}_proj.weight"].chunk(ranks, axis)[rank]

    for rank in range(ranks):
        layer = load(folder, Mesh(ranks, 1, rank)).layers[2]
        expected = (
            torch.cat([part(f"self_attn.{name}", rank) for name in "qkv"]),
            part("self_attn.o", rank, 1),
            torch.cat([part(f"mlp.{name}", rank) for name in ("gate", "up")]),
            part("mlp.down", rank, 1),
        )
        for linear, matrix in zip(products(layer), expected, strict=True):
            assert isinstance(linear, NarrowLinear)
            # The same numbers; float32 scales are multiplied in another order.
            torch.testing.assert_close(numbers_of(linear), matrix, rtol=1e-6, atol=0)
            assert linear.weight.dtype == torch.float8_e4m3fn


def distance(mine: Tensor, theirs: Tensor) -> float:
    return float((mine.double() - theirs.double()).norm() / theirs.double().norm())


@every_kind
def test_logits_are_near_those_of_the_published_numbers(folder: Path, kind: str) -> None:
    """What is left is activations' rounding."""
    quantize(folder, kind)
    narrow = LocalPrefill(folder, 384).logits(PROMPT, 128)
    # The same numbers, read by who knows nothing of 8 bits.
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    wide = {}
    model = load(folder)
    stored = load_file(path)
    for name, tensor in stored.items():
        if not name.endswith(("scale", "scale_inv")):
            wide[name] = tensor.float()
    config = model.config
    width, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    for number, layer in enumerate(model.layers):
        prefix = f"model.layers.{number}"
        qkv = numbers_of(layer.qkv).split((width, kv, kv))
        gate_up = numbers_of(layer.gate_up).chunk(2)
        names = [f"self_attn.{name}_proj" for name in "qkvo"]
        names += [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
        matrices = [*qkv, numbers_of(layer.output), *gate_up, numbers_of(layer.down)]
        for name, matrix in zip(names, matrices, strict=True):
            wide[f"{prefix}.{name}.weight"] = matrix.contiguous()
    save_file(wide, path, metadata={"format": "pt"})
    expected = oracle_logits(folder, PROMPT.tolist())[-1]
    assert 0.001 < distance(narrow, expected) < 0.15


def test_a_checkpoint_of_more_bits_is_rounded_as_it_loads(original: Path) -> None:
    wide, narrow = load(original), load(original, weights="fp8")
    for mine, theirs in zip(narrow.layers, wide.layers, strict=True):
        for linear, other in zip(products(mine), products(theirs), strict=True):
            assert isinstance(linear, NarrowLinear)
            assert isinstance(other, WideLinear)
            torch.testing.assert_close(linear.bias, other.bias, rtol=0, atol=0)
            # Half a step of e4m3, or its smallest one, scaled by a row's largest number, below 3.
            torch.testing.assert_close(
                numbers_of(linear), other.weight, rtol=2**-4, atol=2**-9 * 3 / 448
            )
    assert isinstance(narrow.head, WideLinear)
    assert torch.equal(narrow.embedding, wide.embedding)
    assert narrow.layers[-1].next_norm.narrowing is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_chunks_do_not_change_what_is_computed(original: Path, dtype: torch.dtype) -> None:
    narrow = LocalPrefill(original, 384, dtype, weights="fp8")
    wide = LocalPrefill(original, 384, dtype)
    whole = narrow.logits(PROMPT, 512)
    assert distance(narrow.logits(PROMPT, 128), whole) < (1e-5 if dtype == torch.float32 else 0.05)
    assert 0.001 < distance(whole, wide.logits(PROMPT)) < 0.2


@every_kind
def test_what_a_checkpoint_leaves_in_more_bits_stays_so(folder: Path, kind: str) -> None:
    left = ("model.layers.1.mlp.down_proj", "model.layers.2.self_attn.o_proj")
    quantize(folder, kind, left)
    model = load(folder, weights="fp8")
    assert isinstance(model.layers[1].down, WideLinear)
    assert isinstance(model.layers[2].output, WideLinear)
    assert isinstance(model.layers[0].down, NarrowLinear)
    assert LocalPrefill(folder, 384).logits(PROMPT).isfinite().all()


def test_products_that_are_one_are_kept_alike(folder: Path) -> None:
    quantize(folder, "compressed by channel", ("model.layers.1.self_attn.k_proj",))
    with pytest.raises(CheckpointError, match="k_proj"):
        load(folder)


@pytest.mark.parametrize(
    ("described", "kept"),
    [
        ({"quant_method": "awq"}, "awq"),
        ({"quant_method": "fp8", "fmt": "e5m2"}, "e5m2"),
        ({"quant_method": "fp8", "weight_block_size": [64, 64]}, "64 × 64"),
        ({**compressed("channel"), "format": "pack-quantized"}, "pack-quantized"),
        (compressed("group"), "each group"),
        (compressed("channel", input_activations=None), "activations of more"),
        (compressed("channel", targets=["re:.*mlp.*"]), "several groups"),
        (compressed("channel", weights={**WEIGHTS, "type": "int", "strategy": "channel"}), "int"),
        (
            compressed("channel", input_activations={**ACTIVATIONS, "num_bits": 16}),
            "activations of more",
        ),
    ],
)
def test_other_formats_are_refused_by_name(
    folder: Path, described: dict[str, Any], kept: str
) -> None:
    change(folder, quantization_config=described)
    with pytest.raises(WeightFormatError) as refused:
        load(folder)
    assert kept in refused.value.kept


def test_a_description_that_is_not_whole_is_refused(folder: Path) -> None:
    change(folder, quantization_config={**compressed("channel"), "config_groups": {"a": {}}})
    with pytest.raises(CheckpointError, match="targets"):
        load(folder)


def test_weights_that_are_not_as_described_are_refused(folder: Path) -> None:
    described = json.loads((folder / "config.json").read_text())
    change(folder, quantization_config=compressed("channel"))
    with pytest.raises(CheckpointError, match="makes it of 8 bits"):
        load(folder)
    (folder / "config.json").write_text(json.dumps(described))
    quantize(folder, "compressed by channel")
    change(folder, quantization_config=compressed("tensor"))
    with pytest.raises(CheckpointError, match="weight_scale has shape"):
        load(folder)
    change(folder, quantization_config=None)
    with pytest.raises(CheckpointError, match="does not say"):
        load(folder)


def test_blocks_are_not_divided_among_ranks(folder: Path) -> None:
    quantize(folder, "fp8 by block")
    with pytest.raises(DividedBlockError) as refused:
        load(folder, Mesh(4, 1, 1))
    assert (refused.value.first, refused.value.last) == (64, 128)


@pytest.mark.parametrize(
    ("entry", "covered"),
    [
        ("lm_head", True),
        ("down_proj", False),
        ("model.layers.1", False),
        ("model.layers.1.mlp.down_proj", False),
        ("model.layers.11", True),
        ("re:.*down_proj$", False),
        ("re:down_proj", True),
    ],
)
def test_whose_names_are_ignored(entry: str, covered: bool) -> None:
    quantization = Quantization("weight_scale", "tensor", (entry,))
    assert quantization.covers("model.layers.1.mlp.down_proj") == covered


def test_gpus_multiply_8_bits_for_bfloat16_only(original: Path) -> None:
    """Said before anything is read."""
    config = ModelConfig.from_folder(original)
    with pytest.raises(NarrowComputeError) as refused:
        Qwen2.from_weights(
            config,
            cast(Any, None),
            Mesh.single(),
            torch.float16,
            torch.device("cuda"),
            "fp8",
        )
    assert refused.value.model == "float16"
