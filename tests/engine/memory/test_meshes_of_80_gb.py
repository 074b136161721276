"""Which meshes hold a million tokens on GPUs of 80 GB: what docs/several-gpus.md says."""

import pytest
import torch

from longreach.engine.errors import DoesNotFitError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import PageGeometry
from longreach.engine.memory.fit import PrefillFit, Weights
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.shapes import known_shapes

FREE = int(84e9)
MILLION = 1_000_000
WINDOW = 32_768


def fit_of(shape: str, tensor: int, sequence: int, chunk: int, kept: KVCacheDtype) -> PrefillFit:
    config = ModelConfig.from_folder(known_shapes()[shape])
    weights = Weights(config, 2, tensor)
    heads = weights.heads.num_kv_heads
    geometry = PageGeometry(config.num_layers, heads, config.head_dim, torch.bfloat16)
    gathers = kept != "auto"
    return PrefillFit(weights, geometry.kept_as(kept), FREE, chunk, sequence, WINDOW, gathers)


def holds(fit: PrefillFit, tokens: int) -> bool:
    try:
        fit.check(tokens, tokens)
    except DoesNotFitError:
        return False
    return True


@pytest.mark.parametrize("sequence", [1, 2, 3, 4, 6, 7, 8])
def test_any_number_of_sequence_ranks_holds_the_7b_with_chunks_of_one_gpu(sequence: int) -> None:
    assert holds(fit_of("qwen2.5-7b-1m", 1, sequence, WINDOW, "auto"), MILLION)


@pytest.mark.parametrize("sequence", [2, 3, 4])
def test_up_to_four_hold_it_with_as_much_for_each_rank(sequence: int) -> None:
    assert holds(fit_of("qwen2.5-7b-1m", 1, sequence, sequence * WINDOW, "auto"), MILLION)


def test_eight_hold_nearly_a_million_with_as_much_for_each_rank() -> None:
    fit = fit_of("qwen2.5-7b-1m", 1, 8, 8 * WINDOW, "auto")
    assert holds(fit, 995_584)
    assert not holds(fit, 995_584 + 128)


@pytest.mark.parametrize(
    ("tensor", "sequence"), [(1, 1), (1, 2), (1, 4), (1, 8), (2, 1), (2, 2), (2, 4), (4, 1), (4, 2)]
)
def test_every_mesh_holds_it_with_pages_of_8_bits(tensor: int, sequence: int) -> None:
    fit = fit_of("qwen2.5-7b-1m", tensor, sequence, sequence * WINDOW, "fp8_e4m3")
    assert holds(fit, MILLION)


@pytest.mark.parametrize(
    ("tensor", "sequence", "kept", "expected"),
    [
        (1, 1, "auto", False), (1, 8, "auto", False), (2, 1, "auto", False), (2, 4, "auto", False),
        (4, 1, "auto", True), (4, 2, "auto", True),
        (1, 1, "fp8_e4m3", False), (1, 8, "fp8_e4m3", False),
        (2, 1, "fp8_e4m3", True), (2, 4, "fp8_e4m3", True), (4, 1, "fp8_e4m3", True),
    ],
)  # fmt: skip
def test_the_14b_is_held_by_four_tensor_ranks_or_by_two_with_pages_of_8_bits(
    tensor: int, sequence: int, kept: KVCacheDtype, expected: bool
) -> None:
    assert holds(fit_of("qwen2.5-14b-1m", tensor, sequence, WINDOW, kept), MILLION) is expected
