"""Hopper's kernels against the definition, and against Triton's where the definition is too slow.

Gluon has no interpreter: without a Hopper GPU nothing of this can run.
"""

import math

import pytest
import torch

from longreach.kernels.dual_chunk import (
    QueryBlocks,
    SegmentQueries,
    gluon_prefill,
    reference,
    triton_prefill,
)
from longreach.kernels.pages import LayerPages

from .poison import poison_fresh_memory
from .problem import SCALE, make_problem, relative_error

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9,
    reason="needs a Hopper GPU",
)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [(384, 128), None])
@pytest.mark.parametrize(
    ("length", "blocks", "heads", "head_dim"),
    [
        (1, (0,), (1, 1), 64),
        (63, (0,), (5, 1), 128),
        (128, (0,), (2, 2), 128),
        (247, (0, 1), (2, 1), 64),
        (1000, (2, 7), (7, 1), 64),
        (1153, (0, 3, 4, 9), (4, 2), 128),
    ],
)
def test_dense_attention(monkeypatch, length: int, blocks, heads, head_dim, chunk, dtype) -> None:
    problem = make_problem(
        length, chunk is not None, *heads, head_dim, dtype, chunk or (384, 128),
        torch.device("cuda"),
    )  # fmt: skip
    stride = None if chunk is None else chunk[0] - chunk[1]
    rows = QueryBlocks(blocks, length)
    queries = problem.queries(rows)
    assert gluon_prefill.supports(queries, problem.pages, stride)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    poison_fresh_memory(monkeypatch)
    output, lse = gluon_prefill.attention(queries, rows, problem.pages, stride, SCALE)
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    torch.testing.assert_close(lse.cpu(), expected_lse[where].float(), rtol=5e-3, atol=5e-3)


def random_problem(
    length: int, blocks: QueryBlocks, heads: int, kv_heads: int, head_dim: int
) -> tuple[SegmentQueries, LayerPages]:
    """Random rotations and pages in a random order; what lies past the end is NaN."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(length)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)

    num_pages = -(-length // 128)
    memory = random(num_pages + 2, kv_heads, 2, 128, head_dim)
    table = torch.randperm(num_pages + 2, generator=generator, device=device)[:num_pages].tolist()
    unused = set(range(num_pages + 2)) - set(table)
    memory[list(unused)] = torch.nan
    memory[table[-1], :, :, length - (num_pages - 1) * 128 :] = torch.nan
    rotations = random(3, blocks.num_rows, heads, head_dim)
    return SegmentQueries(*rotations), LayerPages.of(memory, table)


@pytest.mark.parametrize("stride", [None, 1024, 4096])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("length", "blocks"),
    [(16384, range(96, 128)), (13001, range(0, 102, 3)), (5000, range(40))],
)
def test_dense_attention_of_many_tiles(length: int, blocks, head_dim: int, stride) -> None:
    rows = QueryBlocks(tuple(blocks), length)
    queries, pages = random_problem(length, rows, 14, 2, head_dim)
    scale = 1 / math.sqrt(head_dim)
    expected, expected_lse = triton_prefill.attention(queries, rows, pages, stride, scale)
    for _ in range(3):
        output, lse = gluon_prefill.attention(queries, rows, pages, stride, scale)
        assert relative_error(output, expected.cpu()) < 5e-3
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_unaligned_chunks_and_float32_are_not_supported() -> None:
    rows = QueryBlocks((0, 1), 256)
    queries, pages = random_problem(256, rows, 2, 1, 64)
    assert not gluon_prefill.supports(queries, pages, 200)
    wide = SegmentQueries(queries.intra.float(), queries.successive.float(), queries.inter.float())
    assert not gluon_prefill.supports(wide, LayerPages(pages.memory.float(), pages.table), 128)
