"""What is said to fit, and what is raised where it does not."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.errors import DoesNotFitError, MemoryNeeds
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import HeldPages, PageGeometry, PagePool, page_index
from longreach.engine.memory.fit import DecodeFit, PrefillFit, Weights
from longreach.engine.model.config import ModelConfig, WeightFormat
from longreach.engine.model.linear import WideLinear
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.model.shapes import known_shapes
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.kernels.page_size import PAGE_TOKENS, pages_for

from ..checkpoints import DUAL_CHUNK, make_checkpoint

QWEN_7B = ModelConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
CPU = torch.device("cpu")


def geometry_of(weights: Weights, kept: KVCacheDtype = "auto") -> PageGeometry:
    config = weights.config
    heads = weights.heads.num_kv_heads
    return PageGeometry(config.num_layers, heads, config.head_dim, torch.bfloat16).kept_as(kept)


def prefill_of(
    free: float,
    kept: KVCacheDtype = "auto",
    tensor: int = 1,
    sequence: int = 1,
    selects_above: int | None = 32768,
    gathers_pages: bool = False,
    processes: int = 1,
) -> PrefillFit:
    weights = Weights(QWEN_7B, 2, tensor)
    return PrefillFit(
        weights, geometry_of(weights, kept), int(free), 32768, sequence, selects_above,
        gathers_pages, processes=processes,
    )  # fmt: skip


def decode_of(free: float, max_batch: int = 8) -> DecodeFit:
    weights = Weights(QWEN_7B)
    return DecodeFit(weights, geometry_of(weights), int(free), max_batch, 32768, 2 * max_batch)


def bytes_of(model: Qwen2) -> int:
    """Of a rank's matrices as they were loaded."""
    matrices = sum(
        linear.num_bytes
        for layer in model.layers
        for linear in (layer.qkv, layer.output, layer.gate_up, layer.down)
    )
    assert isinstance(model.head, WideLinear)
    tables = {tensor.data_ptr(): tensor for tensor in (model.head.weight, model.embedding)}
    return matrices + sum(table.nbytes for table in tables.values())


@pytest.mark.parametrize("kept", ["auto", "fp8"])
@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_weights_and_pages_are_what_a_rank_loads(
    tmp_path: Path, tensor_parallel: int, tie: bool, kept: WeightFormat
) -> None:
    """The last of four ranks shares its one KV head with another."""
    folder = make_checkpoint(tmp_path, DUAL_CHUNK, tie=tie)
    mesh = Mesh(tensor_parallel, 1, tensor_parallel - 1)
    model = Qwen2.load(folder, mesh, torch.bfloat16, CPU, kept)
    weights = Weights(ModelConfig.from_folder(folder), 2, tensor_parallel, kept)
    assert weights.num_bytes == bytes_of(model)
    assert geometry_of(weights) == model.page_geometry


def test_what_prefill_takes_beside_pages_of_8_bits_is_counted(tmp_path: Path) -> None:
    model = Qwen2.load(make_checkpoint(tmp_path), Mesh.single(), torch.bfloat16, CPU)
    weights = Weights(model.config)
    pool = PagePool(model.page_geometry.kept_as("fp8_e4m3"), 7, CPU)
    prefiller = Prefiller(model, pool, None)
    assert pool.scales is not None
    assert prefiller._parts.widened is not None
    taken = [pool.memory, pool.scales, prefiller._parts.widened.memory]
    fit = PrefillFit(weights, pool.geometry, 1 << 40, 256)
    assert 7 * fit.bytes_per_page == sum(each.numel() * each.element_size() for each in taken)


@pytest.mark.parametrize("fit", [
    prefill_of(80e9), prefill_of(80e9, "fp8_e4m3"), prefill_of(40e9, tensor=4, sequence=2),
    decode_of(80e9),
], ids=["prefill", "narrow", "mesh", "decode"])  # fmt: skip
def test_exactly_what_is_said_to_fit_is_let_through(fit: PrefillFit | DecodeFit) -> None:
    largest = fit.largest_cache()
    fit.check(largest)
    with pytest.raises(DoesNotFitError) as refused:
        fit.check(largest + 1)
    assert refused.value.largest_cache == largest
    assert refused.value.needs.quantized == fit.geometry.quantized
    needs = fit.needs(largest)
    needed = needs.weight_bytes + needs.computing_bytes + needs.cache_bytes
    assert needed <= fit.free < needed + 2 * fit.bytes_per_page


def test_short_prompts_leave_room_for_more_pages() -> None:
    fit = prefill_of(80e9)
    few, many = fit.largest_cache(), fit.largest_cache(32768)
    # Selection sums over the keys of one prompt, if at all, and not over all that is kept.
    assert many > few
    fit.check(many, 32768)
    assert pages_for(many) * PAGE_TOKENS == many


def test_only_prompts_that_are_prefilled_sparsely_need_sums() -> None:
    sparse, dense = prefill_of(80e9), prefill_of(80e9, selects_above=None)
    assert (
        sparse.computing_bytes(32768)
        == dense.computing_bytes(32768)
        == dense.computing_bytes(1_000_000)
    )
    # Sums of columns alone: a float32 for each key and head.
    assert (
        sparse.computing_bytes(1_000_000) >= dense.computing_bytes(1_000_000) + 1_000_000 * 28 * 4
    )
    assert dense.largest_cache() > sparse.largest_cache()


@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("sequence", [1, 3])
def test_pages_that_are_gathered_to_be_sent_are_counted(kept: KVCacheDtype, sequence: int) -> None:
    """What reading a rank's largest share of a chunk takes where its pages lie apart."""
    within, gathered = (
        prefill_of(80e9, kept, sequence=sequence, gathers_pages=gathers)
        for gathers in (False, True)
    )
    own = -(-256 // sequence)
    geometry = replace(gathered.geometry, num_layers=1)
    pool = PagePool(geometry, own, CPU)
    numbers = np.arange(own)[::-1].copy()
    held = HeldPages(pool.layer(0), numbers, page_index(numbers, CPU))
    assert (
        gathered.computing_bytes(1_000_000) - within.computing_bytes(1_000_000)
        == held.read().nbytes
    )


def test_pages_that_come_to_decode_are_counted() -> None:
    fit = decode_of(80e9)
    chunk = PagePool(replace(fit.geometry, num_layers=1), 256, CPU).layer(0).nbytes
    assert fit.computing_bytes(1_000_000) - fit.computing_bytes(0) == chunk
    assert fit.computing_bytes(1) - fit.computing_bytes(0) == chunk // 256


def test_processes_that_look_at_the_same_memory_divide_it() -> None:
    """Two that each took what they were told would fit would not fit together."""
    alone, one_of_two = prefill_of(80e9), prefill_of(160e9, processes=2)
    assert one_of_two.largest_cache() == alone.largest_cache()
    one_of_two.check(alone.largest_cache())
    with pytest.raises(DoesNotFitError) as refused:
        one_of_two.check(alone.largest_cache() + 1)
    assert refused.value.needs == replace(alone.needs(alone.largest_cache() + 1), processes=2)
    assert refused.value.largest_cache == alone.largest_cache()


def test_a_mesh_needs_less_on_each_rank() -> None:
    alone, wide, long = prefill_of(1), prefill_of(1, tensor=4), prefill_of(1, sequence=8)
    assert wide.bytes_per_page * 4 == alone.bytes_per_page
    assert wide.weights.num_bytes < alone.weights.num_bytes / 2
    assert long.computing_bytes(1_000_000) < alone.computing_bytes(1_000_000) / 2
    assert long.weights.num_bytes == alone.weights.num_bytes


def test_every_axis_of_a_mesh_has_a_communicator() -> None:
    """Which is nothing of PyTorch's, and nothing of one rank's."""
    chunk = 32768 // 8 * 8
    one, two = (prefill_of(1, sequence=n, selects_above=None) for n in (1, 2))
    both = prefill_of(1, tensor=2, sequence=2, selects_above=None)
    activations = [chunk // n * each.weights.row_bytes for each, n in ((one, 1), (two, 2))]
    gathered = 2 * chunk * 2 * 4 * 128 * 2
    spared = activations[0] - activations[1] - gathered
    assert one.computing_bytes(chunk) - two.computing_bytes(chunk) == spared - (1 << 30)
    alone = prefill_of(1, tensor=2, selects_above=None)
    assert both.computing_bytes(chunk) > alone.computing_bytes(chunk) // 2 + (1 << 30)


def test_ranks_deal_the_sums_of_all_windows_that_are_computed_at_once() -> None:
    one, four = prefill_of(1), prefill_of(1, sequence=4)
    at_once = replace(four, chunk_tokens=4 * 32768)
    sums = [
        each.computing_bytes(1_000_000) - replace(each, selects_above=None).computing_bytes(10**6)
        for each in (one, at_once, four)
    ]
    assert sums[0] == sums[1] > 2 * sums[2]


def test_what_is_refused_comes_with_its_numbers() -> None:
    fit = prefill_of(80e9)
    with pytest.raises(DoesNotFitError) as refused:
        fit.check(1_000_000)
    assert refused.value.needs == MemoryNeeds(
        "prefill",
        cache_tokens=1_000_000,
        cache_bytes=1_000_064 * 57_344,
        weight_bytes=fit.weights.num_bytes,
        computing_bytes=fit.computing_bytes(1_000_000),
        free_bytes=int(80e9),
        processes=1,
        quantized=False,
    )


@pytest.mark.parametrize("fit", [prefill_of(16e9), decode_of(16e9)], ids=["prefill", "decode"])
def test_a_device_that_is_too_small_is_refused(fit: PrefillFit | DecodeFit) -> None:
    with pytest.raises(DoesNotFitError) as refused:
        fit.check(128)
    assert refused.value.largest_cache == 0
    assert refused.value.needs.weight_bytes == pytest.approx(15.2e9, rel=0.01)


def test_larger_batches_leave_less_for_pages() -> None:
    assert (
        decode_of(80e9, max_batch=64).largest_cache() < decode_of(80e9, max_batch=8).largest_cache()
    )
    fit = decode_of(80e9)
    more = (replace(fit, prompt_tokens=1024), replace(fit, logits_rows=1024))
    assert all(each.largest_cache() < fit.largest_cache() for each in more)
    few = replace(decode_of(80e9), geometry=geometry_of(Weights(QWEN_7B), "fp8_e4m3"))
    assert few.largest_cache() > 1.9 * decode_of(80e9).largest_cache()
