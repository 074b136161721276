"""What is said to fit, and what is told where it does not."""

import weakref
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.errors import ConfigurationError, OutOfMemoryError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import HeldPages, PageGeometry, PagePool, page_index
from longreach.engine.memory.fit import DecodeFit, Mends, PrefillFit, Weights, out_of_memory_raises
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.model.shapes import known_shapes
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.kernels.page_size import PAGE_TOKENS, pages_for

from ..checkpoints import DUAL_CHUNK, make_checkpoint

QWEN_7B = ModelConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
MENDS = Mends("pages", "narrow pages", ("a smaller chunk", "a larger device"))
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
    sharing: int = 1,
) -> PrefillFit:
    weights = Weights(QWEN_7B, 2, tensor)
    return PrefillFit(
        weights, geometry_of(weights, kept), int(free), MENDS, 32768, sequence, selects_above,
        gathers_pages, sharing=sharing,
    )  # fmt: skip


def decode_of(free: float, max_batch: int = 8) -> DecodeFit:
    weights = Weights(QWEN_7B)
    return DecodeFit(weights, geometry_of(weights), int(free), MENDS, max_batch, 32768)


def bytes_of(model: Qwen2) -> int:
    """Of a rank's matrices as they were loaded."""
    matrices = [
        matrix
        for layer in model.layers
        for matrix in (
            layer.qkv_weight, layer.output_weight, layer.gate_up_weight, layer.down_weight
        )
    ]  # fmt: skip
    tables = {tensor.data_ptr(): tensor for tensor in (model.head, model._embedding)}
    return sum(each.numel() * each.element_size() for each in [*matrices, *tables.values()])


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("tensor_parallel", [1, 2, 4])
def test_weights_and_pages_are_what_a_rank_loads(
    tmp_path: Path, tensor_parallel: int, tie: bool
) -> None:
    """The last of four ranks shares its one KV head with another."""
    folder = make_checkpoint(tmp_path, DUAL_CHUNK, tie=tie)
    mesh = Mesh(tensor_parallel, 1, tensor_parallel - 1)
    model = Qwen2.load(folder, mesh, torch.bfloat16, CPU)
    weights = Weights(ModelConfig.from_folder(folder), 2, tensor_parallel)
    assert weights.num_bytes == bytes_of(model)
    assert geometry_of(weights) == model.page_geometry


def test_what_prefill_takes_beside_pages_of_8_bits_is_counted(tmp_path: Path) -> None:
    model = Qwen2.load(make_checkpoint(tmp_path), Mesh.single(), torch.bfloat16, CPU)
    weights = Weights(model.config)
    pool = PagePool(model.page_geometry.kept_as("fp8_e4m3"), 7, CPU)
    prefiller = Prefiller(model, pool, None)
    assert pool.scales is not None
    assert prefiller._widened is not None
    taken = [pool.memory, pool.scales, prefiller._widened.memory]
    fit = PrefillFit(weights, pool.geometry, 1 << 40, MENDS, 256)
    assert 7 * fit.bytes_per_page == sum(each.numel() * each.element_size() for each in taken)


@pytest.mark.parametrize("fit", [
    prefill_of(80e9), prefill_of(80e9, "fp8_e4m3"), prefill_of(40e9, tensor=4, sequence=2),
    decode_of(80e9),
], ids=["prefill", "narrow", "mesh", "decode"])  # fmt: skip
def test_exactly_what_is_said_to_fit_is_let_through(fit: PrefillFit | DecodeFit) -> None:
    longest = fit.longest()
    fit.check(longest)
    with pytest.raises(ConfigurationError) as refused:
        fit.check(longest + 1)
    assert f" {longest:,} tokens would fit; take fewer pages, " in str(refused.value)
    assert ("narrow pages" in str(refused.value)) != fit.geometry.quantized
    taken = fit.weights.num_bytes + fit.besides(longest) + longest // 128 * fit.bytes_per_page
    assert taken <= fit.free < taken + 2 * fit.bytes_per_page


def test_short_prompts_leave_room_for_more_pages() -> None:
    fit = prefill_of(80e9)
    few, many = fit.longest(), fit.longest(32768)
    # Selection sums over the keys of one prompt, if at all, and not over all that is kept.
    assert many > few
    fit.check(many, 32768)
    assert pages_for(many) * PAGE_TOKENS == many


def test_only_prompts_that_are_prefilled_sparsely_need_sums() -> None:
    sparse, dense = prefill_of(80e9), prefill_of(80e9, selects_above=None)
    assert sparse.besides(32768) == dense.besides(32768) == dense.besides(1_000_000)
    # Sums of columns alone: a float32 for each key and head.
    assert sparse.besides(1_000_000) >= dense.besides(1_000_000) + 1_000_000 * 28 * 4
    assert dense.longest() > sparse.longest()


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
    assert gathered.besides(1_000_000) - within.besides(1_000_000) == held.read().nbytes


def test_pages_that_come_to_decode_are_counted() -> None:
    fit = decode_of(80e9)
    chunk = PagePool(replace(fit.geometry, num_layers=1), 256, CPU).layer(0).nbytes
    assert fit.besides(1_000_000) - fit.besides(0) == chunk
    assert fit.besides(1) - fit.besides(0) == chunk // 256


def test_processes_that_look_at_the_same_memory_divide_it() -> None:
    """Two that each took what they were told would fit would not fit together."""
    alone, one_of_two = prefill_of(80e9), prefill_of(160e9, sharing=2)
    assert one_of_two.longest() == alone.longest()
    one_of_two.check(alone.longest())
    with pytest.raises(
        ConfigurationError, match=r"of 80\.0 GB free for each of 2 processes [\d,]+ tokens would"
    ):
        one_of_two.check(alone.longest() + 1)
    assert "80.0 GB that were free for each of 2 processes other" in str(one_of_two.overrun(128))
    with pytest.raises(ConfigurationError, match=r"has 16\.0 GB free for each of 2 processes, whi"):
        prefill_of(32e9, sharing=2).check(128)


def test_a_mesh_needs_less_on_each_rank() -> None:
    alone, wide, long = prefill_of(1), prefill_of(1, tensor=4), prefill_of(1, sequence=8)
    assert wide.bytes_per_page * 4 == alone.bytes_per_page
    assert wide.weights.num_bytes < alone.weights.num_bytes / 2
    assert long.besides(1_000_000) < alone.besides(1_000_000) / 2
    assert long.weights.num_bytes == alone.weights.num_bytes


def test_the_numbers_are_told() -> None:
    with pytest.raises(
        ConfigurationError,
        match=r"1,000,000 tokens \(pages\) need 57\.3 GB of KV pages beside 15\.2 GB of "
        r"weights and up to 9\.\d GB for computing, and of 80\.0 GB free [\d,]+ tokens would fit",
    ):
        prefill_of(80e9).check(1_000_000)


@pytest.mark.parametrize("fit", [prefill_of(16e9), decode_of(16e9)], ids=["prefill", "decode"])
def test_a_device_that_is_too_small_is_refused(fit: PrefillFit | DecodeFit) -> None:
    with pytest.raises(ConfigurationError, match=r"15\.2 GB .* 16\.0 GB free") as refused:
        fit.check(128)
    assert str(refused.value).endswith("; take a smaller chunk, or a larger device")


def test_larger_batches_leave_less_for_pages() -> None:
    assert decode_of(80e9, max_batch=64).longest() < decode_of(80e9, max_batch=8).longest()
    few = replace(decode_of(80e9), geometry=geometry_of(Weights(QWEN_7B), "fp8_e4m3"))
    assert few.longest() > 1.9 * decode_of(80e9).longest()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("as the allocator says it"),
        OutOfMemoryError("as a chunk says it"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["allocator", "chunk", "device", "cublas", "triton"],
)
def test_running_out_of_memory_keeps_nothing_alive(error: Exception) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def take() -> None:
        taken = torch.zeros(3)
        seen.append(weakref.ref(taken))
        raise error

    with (
        pytest.raises(ConfigurationError, match="lower this") as told,
        out_of_memory_raises(ConfigurationError("lower this")),
    ):
        take()
    assert told.value.__cause__ is error
    assert [reference() for reference in seen] == [None]


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate()`"),
    ],
    ids=["python", "device", "cublas"],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with (
        pytest.raises(type(error)) as told,
        out_of_memory_raises(ConfigurationError("lower this")),
    ):
        raise error
    assert told.value is error
