"""Attention of several sequences' rows in one call, against the definition of each alone."""

from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.kernels import dual_chunk, quantized
from longreach.kernels.dual_chunk import SegmentQueries, SequenceRows, reference
from longreach.kernels.dual_chunk.ragged_plan import RaggedPlan, RaggedShape
from longreach.kernels.dual_chunk.segments import rotation
from longreach.kernels.dual_chunk.triton_ragged import ragged_attention
from longreach.kernels.pages import BlockTable
from longreach.kernels.quantized import reference as quantized_reference
from longreach.kernels.quantized import triton_quantized

from .poison import poison_fresh_memory
from .problem import DEVICE, LOW_PRECISION, Problem, make_small_problem, relative_error

# [start, length) of each sequence are its rows: whole prompts, pieces, and single tokens.
MIXES = [
    [(0, 1)],
    [(0, 129), (0, 1), (0, 128)],
    [(128, 300), (0, 17), (384, 385), (0, 63)],
    [(256, 1000), (512, 640)],
]
CHUNKS = [(200, 77), (384, 128), None]
HEADS = [(4, 2, 64), (7, 1, 64), (2, 2, 128)]


@dataclass
class Mix:
    """Several problems in one pool of pages."""

    problems: list[Problem]
    parts: list[SequenceRows]
    memory: Tensor
    stride: int | None

    @classmethod
    def of(cls, bounds, chunk, heads: int, kv_heads: int, head_dim: int) -> "Mix":
        problems = [
            make_small_problem(length, chunk, heads, kv_heads, head_dim) for _, length in bounds
        ]
        parts, first = [], 0
        for (start, length), problem in zip(bounds, problems, strict=True):
            table = BlockTable(problem.pages.table.pages + first)
            parts.append(SequenceRows(start, length, table, problem.scale))
            first += len(problem.pages.memory)
        memory = torch.cat([problem.pages.memory for problem in problems])
        return cls(problems, parts, memory, None if chunk is None else chunk[0] - chunk[1])

    def queries(self, unused: int = 0) -> SegmentQueries:
        """Of all rows, and some more."""
        parts = [
            problem.queries(rows.blocks)
            for problem, rows in zip(self.problems, self.parts, strict=True)
        ]

        def joined(name: str) -> Tensor:
            every = [getattr(part, name) for part in parts]
            return torch.cat([*every, every[0].new_full((unused, *every[0].shape[1:]), torch.nan)])

        return SegmentQueries(joined("intra"), joined("successive"), joined("inter"))

    def expected(self) -> list[Tensor]:
        """By the definition, each alone."""
        return [
            reference.attention(problem.logits, problem.v)[0][rows.start : rows.end]
            for problem, rows in zip(self.problems, self.parts, strict=True)
        ]

    def plan(self, unused: int = 0) -> RaggedPlan:
        rows = sum(part.count for part in self.parts) + unused
        pages = sum(len(part.table.pages) for part in self.parts) + unused
        shape = RaggedShape(rows, len(self.parts) + unused, pages, self.stride)
        plan = RaggedPlan.allocate(shape, DEVICE)
        plan.refresh(self.parts)
        return plan

    def check(self, output: Tensor, tolerance: float) -> None:
        first = 0
        for part, expected in zip(self.parts, self.expected(), strict=True):
            own = output[first : first + part.count]
            assert relative_error(own, expected) < tolerance
            first += part.count
        assert (output[first:] == 0).all()


# Any two of them meet: each mix has each chunk, and each of both all heads.
@pytest.mark.parametrize(
    ("bounds", "heads", "chunk"),
    [
        (bounds, HEADS[(mix + number) % len(HEADS)], chunk)
        for mix, bounds in enumerate(MIXES)
        for number, chunk in enumerate(CHUNKS)
    ],
)
def test_every_sequence_gets_its_own_attention(monkeypatch, bounds, heads, chunk) -> None:
    mix = Mix.of(bounds, chunk, *heads)
    queries, plan = mix.queries(unused=3), mix.plan(unused=3)
    poison_fresh_memory(monkeypatch)
    mix.check(ragged_attention(queries, mix.memory, plan), 5e-3)


@pytest.mark.parametrize("chunk", CHUNKS)
@pytest.mark.parametrize("bounds", MIXES)
def test_portable_attention_is_the_same(bounds, chunk) -> None:
    mix = Mix.of(bounds, chunk, 4, 2, 64)
    output = dual_chunk.ragged_attention(mix.queries(unused=3), mix.memory, mix.parts, mix.stride)
    mix.check(output, 5e-3)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_equal_to_each_alone(chunk) -> None:
    mix = Mix.of(MIXES[2], chunk, 4, 2, 64)
    together = ragged_attention(mix.queries(), mix.memory, mix.plan())
    first = 0
    for problem, part in zip(mix.problems, mix.parts, strict=True):
        alone = Mix([problem], [part], mix.memory, mix.stride)
        own = ragged_attention(alone.queries(), mix.memory, alone.plan())
        assert torch.equal(together[first : first + part.count], own)
        first += part.count


@pytest.mark.parametrize("chunk", CHUNKS)
def test_scales_are_the_sequences_own(chunk) -> None:
    mix = Mix.of([(0, 100), (0, 100)], chunk, 2, 1, 64)
    mix.parts[1] = SequenceRows(0, 100, mix.parts[1].table, 1e-6)
    output = ragged_attention(mix.queries(), mix.memory, mix.plan())
    # With logits next to nothing every key counts alike.
    v = mix.problems[1].v.double().cumsum(0) / torch.arange(1, 101)[:, None, None]
    assert relative_error(output[100:], v.expand(100, 2, 64)) < 5e-3
    mix.parts, mix.problems = mix.parts[:1], mix.problems[:1]
    mix.check(output[:100], 5e-3)


def test_a_plan_is_made_for_so_many_rows() -> None:
    mix = Mix.of([(0, 129), (0, 40)], None, 2, 1, 64)
    plan = mix.plan()
    for changed in (mix.parts * 2, [*mix.parts, SequenceRows(0, 0, mix.parts[0].table, 1.0)]):
        with pytest.raises(ValueError, match="do not fit"):
            plan.refresh(changed)


def test_a_shorter_plan_forgets_the_longer_one() -> None:
    mix = Mix.of([(0, 129), (0, 40)], (200, 77), 2, 1, 64)
    plan, queries = mix.plan(), mix.queries()
    mix.parts, mix.problems = mix.parts[1:], mix.problems[1:]
    plan.refresh(mix.parts)
    own = queries.rows(slice(129, None))
    padded = SegmentQueries(
        *(torch.cat((q, q[:1].expand(129, -1, -1))) for q in (own.intra, own.successive, own.inter))
    )
    mix.check(ragged_attention(padded, mix.memory, plan), 5e-3)


@pytest.mark.parametrize("stride", [123, 256, None])
@pytest.mark.parametrize("seed", range(4))
def test_a_shape_has_room_for_any_rows(stride: int | None, seed: int) -> None:
    random = np.random.default_rng(seed)
    starts = random.integers(0, 6, size=7) * 128
    lengths = starts + random.integers(1, 400, size=7)
    parts = [
        SequenceRows(int(start), int(end), BlockTable.of(range(-(-int(end) // 128))), 1.0)
        for start, end in zip(starts, lengths, strict=True)
    ]
    pages = sum(len(part.table.pages) for part in parts)
    shape = RaggedShape(sum(part.count for part in parts), 7, pages, stride)
    plan = RaggedPlan.allocate(shape, torch.device("cpu"))
    plan.refresh(parts)
    assert int(plan.spans[:, 1].sum()) == int(plan.blocks[:, 2].sum()) == shape.rows


@pytest.mark.parametrize("dtype", [torch.float32, LOW_PRECISION])
def test_pages_of_8_bits(monkeypatch, dtype: torch.dtype) -> None:
    """Against attention over the numbers that the pages hold."""
    bounds = [(128, 300), (0, 17), (0, 128)]
    mix = Mix.of(bounds, (384, 128), 4, 2, 64)
    wide = mix.memory.nan_to_num().float()
    page_scales = quantized_reference.scale_for(wide.abs().amax((-2, -1)))
    memory = (wide / page_scales[..., None, None]).to(torch.float8_e4m3fn)
    held = (memory.float() * page_scales[..., None, None]).to(dtype)
    queries = mix.queries().to(dtype)
    on_cpu = SegmentQueries(*(q.cpu() for q in (queries.intra, queries.successive, queries.inter)))
    portable = partial(dual_chunk.ragged_attention, on_cpu, parts=mix.parts, stride=mix.stride)
    expected = portable(held.cpu())
    narrow = portable(memory.cpu(), page_scales=page_scales.cpu())
    assert relative_error(narrow, expected) < 5e-3
    poison_fresh_memory(monkeypatch)
    output = ragged_attention(queries, memory, mix.plan(), page_scales)
    assert relative_error(output, expected) < 5e-3


@pytest.mark.parametrize("version", [quantized_reference, triton_quantized])
def test_blocks_are_narrowed_like_pages_of_their_own(version) -> None:
    rows, kv_heads, head_dim = 400, 2, 64
    k, v = (torch.randn(rows, kv_heads, head_dim, device=DEVICE) for _ in range(2))
    turn = rotation(torch.arange(rows, device=DEVICE) * 7, head_dim, 1e4)
    blocks = torch.tensor([[3, 0, 128], [5, 128, 31], [0, 0, 0], [1, 159, 128]], dtype=torch.int32)
    memory = torch.zeros(6, kv_heads, 2, 128, head_dim, device=DEVICE).to(torch.float8_e4m3fn)
    scales = torch.zeros(6, kv_heads, 2, device=DEVICE)
    version.narrow_blocks(memory, scales, blocks.to(DEVICE), k, v, turn)
    expected, expected_scales = memory.clone().view(torch.uint8).zero_(), torch.zeros_like(scales)
    for page, first, count in blocks.tolist():
        if count:
            own = slice(first, first + count)
            angles = type(turn)(turn.cosine[own], turn.sine[own])
            quantized.narrow_pages(
                expected.view(torch.float8_e4m3fn), expected_scales,
                torch.tensor([page], device=DEVICE), k[own], v[own], angles,
            )  # fmt: skip
    assert torch.equal(memory.view(torch.uint8), expected)
    assert torch.equal(scales, expected_scales)
