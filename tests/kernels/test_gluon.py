"""Hopper's kernels against the definition, and against Triton's where the definition is too slow.

Gluon has no interpreter: without a Hopper GPU nothing of this can run.
"""

import math

import numpy as np
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
from longreach.kernels.sparse import Selections, gluon_attention, triton_attention

from .poison import poison_fresh_memory
from .problem import make_small_problem, relative_error
from .test_sparse import expected_attention, selections_below, to_device

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
def test_dense_attention(
    monkeypatch, length: int, blocks, heads: tuple[int, int], head_dim: int, chunk, dtype
) -> None:
    problem = make_small_problem(length, chunk, *heads, head_dim, dtype)
    stride = None if chunk is None else chunk[0] - chunk[1]
    rows = QueryBlocks(blocks, length)
    queries = problem.queries(rows)
    assert gluon_prefill.supports(queries, problem.pages, stride)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    poison_fresh_memory(monkeypatch)
    output, lse = gluon_prefill.attention(queries, rows, problem.pages, stride, problem.scale)
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    assert relative_error(lse, expected_lse[where]) < 5e-3


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


@pytest.mark.parametrize("chunk", [(384, 128), None])
@pytest.mark.parametrize(("length", "blocks"), [(1000, (1, 4, 7)), (897, (6, 7)), (111, (0,))])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_sparse_attention(monkeypatch, length: int, blocks, chunk, head_dim: int) -> None:
    problem = make_small_problem(length, chunk, head_dim=head_dim)
    selections = selections_below(length)
    expected, expected_lse = expected_attention(problem, selections)
    rows = QueryBlocks(blocks, length)
    queries = problem.queries(rows)
    poison_fresh_memory(monkeypatch)
    output, lse = gluon_attention.attention(
        queries,
        rows,
        problem.pages,
        None if chunk is None else 256,
        problem.scale,
        to_device(selections),
    )
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    assert relative_error(lse, expected_lse[where]) < 5e-3


def random_selections(length: int, heads: int, most: int) -> Selections:
    """Anything from nothing to much, different for each head."""
    generator = np.random.default_rng(length)
    tiles = -(-length // 128)
    columns = [
        np.flatnonzero(generator.random(length) < generator.random() ** 4) for _ in range(heads)
    ]
    distances = [
        np.union1d([0], generator.choice(tiles, generator.integers(min(tiles, most) + 1)))
        for _ in range(heads)
    ]
    columns[0] = columns[0][:0]
    distances[1] = np.array([0])
    chosen = Selections.of(
        [each.tolist() for each in columns], [each.tolist() for each in distances]
    )
    return to_device(chosen)


@pytest.mark.parametrize("stride", [None, 1024, 4096])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize(
    ("length", "blocks"),
    [(16384, range(96, 128)), (13001, range(0, 102, 3)), (5000, range(40))],
)
def test_sparse_attention_of_many_tiles(length: int, blocks, head_dim: int, stride) -> None:
    rows = QueryBlocks(tuple(blocks), length)
    queries, pages = random_problem(length, rows, 14, 2, head_dim)
    chosen = random_selections(length, 14, 60)
    arguments = (queries, rows, pages, stride, 1 / math.sqrt(head_dim), chosen)
    expected, expected_lse = triton_attention.attention(*arguments)
    for _ in range(3):
        output, lse = gluon_attention.attention(*arguments)
        assert relative_error(output, expected.cpu()) < 5e-3
        torch.testing.assert_close(lse, expected_lse, rtol=1e-4, atol=1e-4)


def test_selecting_everything_is_dense_attention_and_nothing_the_own_tile() -> None:
    rows = QueryBlocks((3, 20, 39), 5000)
    queries, pages = random_problem(5000, rows, 14, 2, 128)
    dense, dense_lse = gluon_prefill.attention(queries, rows, pages, 1024, 0.1)
    for columns, distances in (([], range(40)), (range(5000), [0]), (range(5000), range(40))):
        everything = to_device(Selections.of([list(columns)] * 14, [list(distances)] * 14))
        output, lse = gluon_attention.attention(queries, rows, pages, 1024, 0.1, everything)
        assert relative_error(output, dense.cpu()) < 5e-3
        torch.testing.assert_close(lse, dense_lse, rtol=1e-4, atol=1e-4)
    nothing = to_device(Selections.of([[]] * 14, [[0]] * 14))
    output, _ = gluon_attention.attention(queries, rows, pages, 1024, 0.1, nothing)
    expected, _ = triton_attention.attention(queries, rows, pages, 1024, 0.1, nothing)
    assert relative_error(output, expected.cpu()) < 5e-3
