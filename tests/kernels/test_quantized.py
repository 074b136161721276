"""KV pages of 8 bits (kernels on a GPU, or in Triton's interpreter) against what was written."""

import pytest
import torch
from torch import Tensor

from longreach.kernels.dual_chunk.segments import rotation
from longreach.kernels.quantized import reference, triton_quantized

from .poison import poison_fresh_memory
from .test_elementwise import exact_rotation

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
VERSIONS = [reference, triton_quantized]
TYPES = [torch.float32, torch.float16, torch.bfloat16]
HALF_STEP = 2.0**-4
"""Half the distance of two neighbours of e4m3, relative to the smaller one."""

every_version = pytest.mark.parametrize(
    "version", VERSIONS, ids=lambda module: module.__name__.rpartition(".")[-1]
)
every_type = pytest.mark.parametrize("dtype", TYPES, ids=str)
sizes = pytest.mark.parametrize(
    ("count", "kv_heads", "head_dim"),
    [(1, 4, 128), (128, 1, 64), (300, 2, 64), (129, 8, 128), (0, 2, 64)],
)


@pytest.fixture(autouse=True)
def poisoned_fresh_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    poison_fresh_memory(monkeypatch)


def poisoned_pages(count: int, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    memory = torch.zeros(count, kv_heads, 2, 128, head_dim, device=DEVICE)
    scales = torch.full((count, kv_heads, 2), torch.nan, device=DEVICE)
    return memory.fill_(torch.nan).to(torch.float8_e4m3fn), scales


def random_keys_values(count: int, kv_heads: int, head_dim: int, dtype: torch.dtype):
    """Views with rows apart; some channels are far larger than others, as biases make them."""
    fused = torch.randn(count, 2 * kv_heads + 1, head_dim)
    fused[:, :, 3] *= 90
    fused = fused.to(dtype).to(DEVICE)
    return fused[:, :kv_heads], fused[:, kv_heads : 2 * kv_heads]


def assert_rounded(actual: Tensor, exact: Tensor, largest: Tensor) -> None:
    """To the nearest e4m3 value of a scale that fits `largest`, after rounding to float32."""
    smallest_step = largest / 448 * 2 * 2.0**-10
    allowed = exact.abs() * HALF_STEP * 1.001 + smallest_step * 1.001
    assert ((actual.double() - exact).abs() <= allowed).all()


def widened(version, memory: Tensor, scales: Tensor, table: Tensor, dtype: torch.dtype) -> Tensor:
    out = torch.empty(len(table), *memory.shape[1:], dtype=dtype, device=DEVICE)
    version.widen_pages(memory, scales, table, out)
    return out


@every_version
@every_type
@sizes
def test_whole_pages_come_back_rounded(version, dtype, count, kv_heads, head_dim) -> None:
    memory, scales = poisoned_pages(6, kv_heads, head_dim)
    k, v = random_keys_values(count, kv_heads, head_dim, dtype)
    num_pages = -(-count // 128)
    pages = torch.randperm(6)[:num_pages].to(DEVICE)
    turn = rotation(torch.arange(count, device=DEVICE) * 31, head_dim, 1e4)
    version.narrow_pages(memory, scales, pages, k, v, turn)
    wide = widened(version, memory, scales, pages.int(), torch.float32)
    by_token = wide.transpose(1, 3).reshape(num_pages * 128, 2, kv_heads, head_dim)
    for which, exact in enumerate((exact_rotation(k, turn), v.double())):
        if count:
            assert_rounded(by_token[:count, which], exact, exact.abs().max())
    assert (by_token[count:] == 0).all()
    untouched = torch.ones(6, dtype=torch.bool, device=DEVICE)
    untouched[pages] = False
    assert memory[untouched].float().isnan().all()
    assert scales[untouched].isnan().all()
    assert (scales[pages].log2() % 1 == 0).all()


@every_version
@sizes
def test_bfloat16_holds_pages_exactly(version, count, kv_heads, head_dim) -> None:
    memory, scales = poisoned_pages(4, kv_heads, head_dim)
    k, v = random_keys_values(count, kv_heads, head_dim, torch.bfloat16)
    pages = torch.randperm(4)[: -(-count // 128)].to(DEVICE)
    turn = rotation(torch.arange(count, device=DEVICE), head_dim, 1e4)
    version.narrow_pages(memory, scales, pages, k, v, turn)
    exact = widened(version, memory, scales, pages.int(), torch.float32)
    assert torch.equal(widened(version, memory, scales, pages.int(), torch.bfloat16).float(), exact)


@pytest.mark.parametrize("largest", [0.0, 1e-40, 1e-3, 447.9, 448.0, 448.1, 1.0, 3e38])
def test_scales_are_the_least_powers_of_two_that_fit(largest: float) -> None:
    scale = float(reference.scale_for(torch.tensor([largest])))
    assert largest <= 448 * scale
    assert largest > 224 * scale or scale == 2.0**-126


def append(version, memory, scales, slots, k, v, positions) -> None:
    turn = rotation(torch.tensor(positions, device=DEVICE), k.shape[-1], 1e4)
    version.append_tokens(memory, scales, torch.tensor(slots, device=DEVICE), k, v, turn)


@every_version
@every_type
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 128), (3, 64)])
def test_tokens_join_pages_that_grow_with_them(version, dtype, kv_heads, head_dim) -> None:
    memory, scales = poisoned_pages(5, kv_heads, head_dim)
    tokens = 7
    k, v = (torch.randn(tokens, 2, kv_heads, head_dim) for _ in range(2))
    growth = torch.tensor([1e-3, 1, 0.5, 40, 3, 900, 0])[:, None, None, None]
    k, v = ((each * growth).to(dtype).to(DEVICE) for each in (k, v))
    for token in range(tokens):
        append(
            version, memory, scales, [3 * 128 + token, 128 + token], k[token], v[token], [token] * 2
        )
        append(version, memory, scales, [-1], k[token, :1] * 7, v[token, :1] * 7, [token])
        wide = widened(
            version,
            memory,
            scales,
            torch.tensor([3, 1], dtype=torch.int32, device=DEVICE),
            torch.float32,
        )
        turn = rotation(torch.arange(token + 1, device=DEVICE), head_dim, 1e4)
        for row in range(2):
            for which, exact in enumerate(
                (exact_rotation(k[: token + 1, row], turn), v[: token + 1, row].double())
            ):
                held = wide[row, :, which, : token + 1].transpose(0, 1)
                for head in range(kv_heads):
                    assert_rounded(held[:, head], exact[:, head], exact[:, head].abs().max())
    assert memory[[0, 2, 4]].float().isnan().all()
    assert scales[[0, 2, 4]].isnan().all()


@every_version
def test_a_token_at_offset_0_forgets_the_page(version) -> None:
    memory, scales = poisoned_pages(1, 1, 64)
    k = torch.full((1, 1, 64), 1e4, device=DEVICE)
    for factor in (1.0, 1e-6):
        append(version, memory, scales, [0], k * factor, k * factor, [0])
        wide = widened(
            version, memory, scales, torch.zeros(1, dtype=torch.int32, device=DEVICE), torch.float32
        )
        torch.testing.assert_close(
            wide[0, 0, :, 0], (k * factor)[0].expand(2, -1), rtol=HALF_STEP, atol=0
        )


def test_both_versions_write_the_same() -> None:
    k, v = random_keys_values(300, 2, 64, torch.bfloat16)
    turn = rotation(torch.arange(300, device=DEVICE), 64, 1e4)
    results = []
    for version in VERSIONS:
        memory, scales = poisoned_pages(3, 2, 64)
        pages = torch.tensor([2, 0, 1], device=DEVICE)
        version.narrow_pages(memory, scales, pages, k, v, turn)
        results.append((memory.float(), scales))
    assert torch.equal(results[0][1], results[1][1])
    # Float32 sums of two products may differ in their last bit, and then lie on another side of a
    # border between two e4m3 values.
    assert (results[0][0] != results[1][0]).double().mean() < 1e-3
