"""Paged decode attention on GPUs (or in Triton's interpreter), and its plan."""

from dataclasses import dataclass
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from longreach.kernels.dual_chunk import SegmentQueries
from longreach.kernels.dual_chunk.decode_plan import DecodePlan
from longreach.kernels.dual_chunk.reference import plain_positions, relative_positions
from longreach.kernels.dual_chunk.segments import rotation
from longreach.kernels.dual_chunk.triton_decode import DecodeTiling, decode_attention
from longreach.kernels.pages import to_pages, write_pages
from longreach.kernels.quantized.reference import scale_for as reference_scale

from .poison import poison_fresh_memory

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
THETA = 1e4
CHUNK, LOCAL = 200, 77
STRIDE = CHUNK - LOCAL
TOLERANCE = {torch.float32: 2e-5, torch.float16: 1e-3, torch.bfloat16: 5e-3}


@dataclass
class Step:
    """One decode step of sequences of their own lengths, with its float64 answer."""

    queries: SegmentQueries
    memory: Tensor
    block_tables: Tensor
    scales: Tensor
    output: Tensor  # float64 [batch, heads, d]
    lse: Tensor  # float64 [batch, heads]
    page_scales: Tensor | None = None

    def attend(self, plan: DecodePlan, stride: int | None, tiling: DecodeTiling | None):
        return decode_attention(
            self.queries,
            self.memory,
            self.block_tables,
            plan,
            stride,
            self.scales,
            tiling,
            self.page_scales,
        )


def make_step(
    lengths: list[int],
    heads: int = 7,
    kv_heads: int = 1,
    head_dim: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    dual: bool = True,
    quantized: bool = False,
) -> Step:
    """Pages lie shuffled in a pool of NaN; block tables name a page of NaN where they end."""
    torch.manual_seed(sum(lengths))
    counts = [-(-length // 128) for length in lengths]
    pages = torch.randperm(sum(counts) + 2).tolist()
    unused = pages.pop()
    memory = torch.full((len(pages) + 1, kv_heads, 2, 128, head_dim), torch.nan, dtype=dtype)
    page_scales = None
    if quantized:
        memory = memory.float().to(torch.float8_e4m3fn)
        page_scales = torch.full((len(pages) + 1, kv_heads, 2), torch.nan)
    block_tables = torch.full((len(lengths), max(*counts, 1) + 1), unused, dtype=torch.int32)
    scales = torch.rand(len(lengths)) * 0.2 + 0.1
    rotated = torch.full((3, len(lengths), heads, head_dim), torch.nan, dtype=dtype)
    output = torch.zeros(len(lengths), heads, head_dim, dtype=torch.float64)
    lse = torch.full((len(lengths), heads), -torch.inf, dtype=torch.float64)
    for row, (length, count) in enumerate(zip(lengths, counts, strict=True)):
        if length == 0:
            continue
        table = [pages.pop() for _ in range(count)]
        block_tables[row, :count] = torch.tensor(table)
        positions = torch.arange(length)
        offsets = positions % STRIDE if dual else positions
        k, v = torch.randn(2, length, kv_heads, head_dim)
        k = rotation(offsets, head_dim, THETA).apply(k).to(dtype)
        v = v.to(dtype)
        if page_scales is None:
            write_pages(memory, table, 0, k, v)
        else:
            k, v = _quantize(memory, page_scales, table, k, v)
        last = int(offsets[-1])
        farthest = [last, min(last + STRIDE, CHUNK), CHUNK] if dual else [last] * 3
        q = torch.randn(1, heads, head_dim)
        for segment, position in enumerate(farthest):
            angles = rotation(torch.tensor([position]), head_dim, THETA)
            rotated[segment, row] = angles.apply(q)[0].to(dtype)
        output[row], lse[row] = _exact(rotated[:, row], k, v, offsets, float(scales[row]), dual)
    queries = SegmentQueries(*(each.to(DEVICE) for each in rotated))
    if page_scales is not None:
        page_scales = page_scales.to(DEVICE)
    return Step(
        queries, memory.to(DEVICE), block_tables.to(DEVICE), scales.to(DEVICE), output, lse,
        page_scales,
    )  # fmt: skip


def _quantize(memory: Tensor, page_scales: Tensor, table: list[int], k: Tensor, v: Tensor):
    """Write rotated K and V into pages whose rest is NaN, and return what these hold of them."""
    factors = torch.logspace(-3, 3, len(table)).repeat_interleave(128)[: len(k), None, None]
    k, v = k * factors.flip(0).clamp(max=3), v * factors
    held = to_pages(k.float(), v.float())
    own = torch.ones(*held.shape[:3]) * 2.0 ** torch.randint(-9, -2, held.shape[:3])
    own = torch.maximum(own, reference_scale(held.abs().amax((-2, -1))))
    page_scales[table] = own
    narrow = (held / own[..., None, None]).to(memory.dtype)
    raw = narrow.view(torch.uint8).clone()
    rest = len(k) % 128
    if rest:
        raw[-1, :, :, rest:] = 0x7F  # NaN
    memory.view(torch.uint8)[table] = raw
    wide = narrow.float() * own[..., None, None]
    flat = wide.permute(0, 3, 2, 1, 4).flatten(0, 1)[: len(k)]
    return flat[:, 0], flat[:, 1]


def _exact(rotated: Tensor, k: Tensor, v: Tensor, offsets: Tensor, scale: float, dual: bool):
    """Softmax in float64. Which rotation meets which key is told from the definition's position."""
    length, (heads, head_dim) = len(k), rotated.shape[1:]
    relative = (relative_positions(length, CHUNK, LOCAL) if dual else plain_positions(length))[-1]
    meets = relative + offsets  # the position that the query was rotated for
    last = int(offsets[-1])
    successive = min(last + STRIDE, CHUNK)
    # Where two rotations are for the same position, they are the same.
    segment = torch.where(meets == last, 0, torch.where(meets == successive, 1, 2))
    group = heads // k.shape[1]
    keys, values = (each.double().repeat_interleave(group, 1) for each in (k, v))
    queries = rotated.double()[segment]  # [length, heads, d]
    logits = (queries * keys).sum(-1) * scale
    output = torch.einsum("nh,nhd->hd", logits.softmax(0), values)
    assert output.shape == (heads, head_dim)
    return output, logits.logsumexp(0)


def check(
    step: Step, lengths: list[int], programs: int, dual: bool, tiling: DecodeTiling | None
) -> None:
    plan = DecodePlan.allocate(len(lengths), programs, DEVICE)
    plan.refresh(lengths)
    output, lse = step.attend(plan, STRIDE if dual else None, tiling)
    assert output.dtype == step.queries.intra.dtype
    used = torch.tensor(lengths) > 0
    error = (output.cpu().double() - step.output)[used]
    assert error.norm() < TOLERANCE[output.dtype] * step.output.norm()
    torch.testing.assert_close(lse.cpu().double(), step.lse, rtol=2e-3, atol=2e-3)
    assert (output.cpu()[~used] == 0).all()


TILINGS = [
    DecodeTiling(tokens=128),
    DecodeTiling(tokens=32),
]


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
@pytest.mark.parametrize(("programs", "dual"), [(5, True), (1, False)])
def test_batches_of_very_unequal_lengths(monkeypatch, programs, dual, tiling) -> None:
    lengths = [1, 1000, 0, 63, 111, 128, 129, 0]
    step = make_step(lengths, dual=dual)
    poison_fresh_memory(monkeypatch)
    check(step, lengths, programs, dual, tiling)


@pytest.mark.parametrize("tiling", TILINGS, ids=str)
def test_lengths_around_chunk_borders(monkeypatch, tiling) -> None:
    lengths = [STRIDE * chunks + beyond for chunks in (1, 2, 3) for beyond in (-1, 0, 1, 2)]
    step = make_step(lengths, heads=2)
    poison_fresh_memory(monkeypatch)
    check(step, lengths, 9, True, tiling)


@pytest.mark.parametrize(
    ("group", "dtype", "head_dim"),
    [
        (1, torch.bfloat16, 128),
        (2, torch.float16, 64),
        (5, torch.float32, 64),
        (7, torch.float16, 128),
        (7, torch.bfloat16, 128),
        (5, torch.bfloat16, 64),
    ],
)
def test_head_groups_and_types(monkeypatch, group, dtype, head_dim) -> None:
    lengths = [300, 7]
    step = make_step(lengths, group * 2, 2, head_dim, dtype)
    poison_fresh_memory(monkeypatch)
    check(step, lengths, 3, True, DecodeTiling())


@pytest.mark.parametrize(
    ("group", "dtype", "head_dim", "dual"),
    [
        (1, torch.bfloat16, 128, True),
        (2, torch.float16, 64, True),
        (5, torch.float32, 64, True),
        (5, torch.bfloat16, 128, False),
        (7, torch.bfloat16, 64, True),
        (7, torch.float16, 128, False),
    ],
)
@pytest.mark.parametrize("tiling", [None, DecodeTiling(tokens=32)], ids=str)
def test_pages_of_8_bits(monkeypatch, group, dtype, head_dim, dual, tiling) -> None:
    lengths = [1, 300, 0, 63, 129, 256, 555]
    step = make_step(lengths, group * 2, 2, head_dim, dtype, dual, quantized=True)
    poison_fresh_memory(monkeypatch)
    check(step, lengths, 3, dual, tiling)


@pytest.mark.parametrize("factor", [2.0**-20, 2.0**14])
def test_queries_beyond_float16_meet_pages_of_8_bits(factor) -> None:
    step = make_step([300, 200], 4, 2, quantized=True)
    scaled = SegmentQueries(*(each * factor for each in vars(step.queries).values()))
    plan = DecodePlan.allocate(2, 3, DEVICE)
    plan.refresh([300, 200])
    output, _ = decode_attention(
        scaled, step.memory, step.block_tables, plan, STRIDE, step.scales / factor, None,
        step.page_scales,
    )  # fmt: skip
    assert (output.cpu().double() - step.output).norm() < 5e-3 * step.output.norm()


def test_pages_and_scales_belong_together() -> None:
    step = make_step([5], quantized=True)
    step.page_scales = None
    plan = DecodePlan.allocate(1, 1, DEVICE)
    with pytest.raises(ValueError, match="float8_e4m3fn need scales"):
        step.attend(plan, STRIDE, DecodeTiling())


def test_more_partial_results_than_are_merged_at_once() -> None:
    lengths = [128 * 70 - 3]
    step = make_step(lengths, heads=2, dual=False)
    check(step, lengths, 70, False, DecodeTiling(tokens=128))


def test_heads_of_a_wider_pool_can_be_attended_alone() -> None:
    step = make_step([300], heads=4, kv_heads=2)
    plan = DecodePlan.allocate(1, 2, DEVICE)
    plan.refresh([300])
    one = step.queries.heads(slice(2, 4))
    output, _ = decode_attention(
        one, step.memory[:, 1:], step.block_tables, plan, STRIDE, step.scales
    )
    assert (output.cpu().double() - step.output[:, 2:]).norm() < 5e-3 * step.output[:, 2:].norm()


def test_a_plan_is_refreshed_in_place() -> None:
    plan = DecodePlan.allocate(3, 4, DEVICE)
    address = plan.items.data_ptr()
    for lengths in ([900, 0, 5], [3], [200, 300, 400]):
        step = make_step([*lengths, 0, 0][:3], heads=2)
        plan.refresh(lengths)
        assert plan.items.data_ptr() == address
        output, _ = step.attend(plan, STRIDE, DecodeTiling())
        assert (output.cpu().double() - step.output).norm() < 5e-3 * step.output.norm()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="graphs are captured on GPUs")
def test_a_captured_step_follows_its_plan() -> None:
    plan = DecodePlan.allocate(2, 16, DEVICE)
    short, long = make_step([3, 0]), make_step([900, 1000])
    memory, tables = long.memory.clone(), long.block_tables.clone()
    queries = SegmentQueries(*(torch.zeros_like(long.queries.intra) for _ in range(3)))
    scales = long.scales.clone()
    decode_attention(queries, memory, tables, plan, STRIDE, scales)  # compiled before capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output, _ = decode_attention(queries, memory, tables, plan, STRIDE, scales)
    for step, lengths in ((short, [3, 0]), (long, [900, 1000])):
        memory[: len(step.memory)] = step.memory
        tables[:, : step.block_tables.shape[1]] = step.block_tables
        scales.copy_(step.scales)
        for mine, theirs in zip(vars(queries).values(), vars(step.queries).values(), strict=True):
            mine.copy_(theirs)
        plan.refresh(lengths)
        graph.replay()
        assert (output.cpu().double() - step.output).norm() < 5e-3 * step.output.norm()


@pytest.mark.skipif(DEVICE.type == "cpu", reason="takes 5 GB that would be copied")
def test_pools_beyond_two_to_the_31_elements() -> None:
    step = make_step([300], head_dim=128)
    far = 2**31 // (2 * 128 * 128) + 5
    memory = torch.empty(
        far + len(step.memory), 1, 2, 128, 128, dtype=torch.bfloat16, device="cuda"
    )
    memory[far:] = step.memory
    plan = DecodePlan.allocate(1, 2, DEVICE)
    plan.refresh([300])
    output, _ = decode_attention(
        step.queries, memory, step.block_tables + far, plan, STRIDE, step.scales,
    )  # fmt: skip
    assert (output.cpu().double() - step.output).norm() < 5e-3 * step.output.norm()


def test_a_plan_for_another_batch_is_refused() -> None:
    step = make_step([3, 4])
    with pytest.raises(ValueError, match="a plan for 3 rows does not fit 2 queries"):
        step.attend(DecodePlan.allocate(3, 1, DEVICE), STRIDE, DecodeTiling())
    with pytest.raises(ValueError, match="3 sequences do not fit in a plan for 2"):
        DecodePlan.allocate(2, 1, DEVICE).refresh([1, 2, 3])


@given(
    lengths=st.lists(st.integers(0, 500) | st.integers(0, 2**20), min_size=1, max_size=20),
    spare=st.integers(0, 3),
    programs=st.integers(1, 70),
)
def test_every_page_is_in_one_item_and_programs_are_equal(lengths, spare, programs) -> None:
    plan = DecodePlan.allocate(len(lengths) + spare, programs, torch.device("cpu"))
    plan.refresh([2**20] * len(lengths))  # what is left of another plan must not matter
    plan.refresh(lengths)
    pages = [-(-length // 128) for length in lengths] + [0] * spare
    assert plan.lengths.tolist() == lengths + [0] * spare
    bounds = plan.sequence_items.tolist()
    items = plan.items.tolist()
    assert bounds[0] == 0
    assert bounds[-1] <= len(items)
    for sequence, count in enumerate(pages):
        own = items[bounds[sequence] : bounds[sequence + 1]]
        assert all(each[0] == sequence for each in own)
        assert [page for _, first, last in own for page in range(first, last)] == [*range(count)]
        assert all(first < last for _, first, last in own)
    shares = plan.program_items.tolist()
    assert (shares[0], shares[-1]) == (0, bounds[-1])
    assert shares == sorted(shares)
    work = [
        sum(last - first for _, first, last in items[start:end]) for start, end in pairwise(shares)
    ]
    costs = sum(pages) + sum(count > 0 for count in pages)
    assert max(work) <= -(-costs // programs)
