"""Dense dual chunk attention and its positions against the definition."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.kernels import dual_chunk
from longreach.kernels.dual_chunk import (
    KeyBounds,
    QueryBlocks,
    SegmentQueries,
    Span,
    reference,
    split_at_chunks,
    triton_prefill,
)

from .poison import poison_fresh_memory
from .problem import CHUNK, LOCAL, SCALE, make_problem, make_small_problem, relative_error

STRIDE = CHUNK - LOCAL


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize(
    ("length", "blocks"),
    [
        (1, (0,)),
        (63, (0,)),
        (128, (0,)),
        (247, (0, 1)),
        (1000, (0, 3, 7)),
        (1000, (2, 5)),
        (640, (4,)),
    ],
)
def test_dense_attention(length: int, blocks: tuple[int, ...], dual: bool) -> None:
    problem = make_problem(length, dual)
    rows = QueryBlocks(blocks, length)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    output, lse = dual_chunk.attention(
        problem.queries(rows), rows, problem.pages, STRIDE if dual else None, SCALE
    )
    where = rows.positions()
    torch.testing.assert_close(output, expected[where].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse[where].float(), rtol=1e-4, atol=1e-4)


SIZES = [
    (1, (0,), 1, 1, 64),
    (63, (0,), 5, 1, 128),
    (111, (0,), 4, 2, 64),
    (247, (0, 1), 2, 1, 64),
    (1000, (2, 7), 7, 1, 64),
]
CHUNKS = [(200, 77), (384, 128), None]


@pytest.mark.parametrize(
    ("length", "blocks", "heads", "kv_heads", "head_dim", "chunk"),
    [
        *((*sizes, chunk) for sizes in SIZES for chunk in CHUNKS),
        # Far from the first key, over many borders of chunks that lie within pages.
        (4097, (17, 32), 1, 1, 64, (200, 77)),
    ],
)
def test_triton_prefill(
    monkeypatch, length: int, blocks, heads: int, kv_heads: int, head_dim: int, chunk
) -> None:
    problem = make_small_problem(length, chunk, heads, kv_heads, head_dim)
    rows = QueryBlocks(blocks, length)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    queries = problem.queries(rows)
    poison_fresh_memory(monkeypatch)
    output, lse = triton_prefill.attention(
        queries, rows, problem.pages, None if chunk is None else chunk[0] - chunk[1], problem.scale
    )
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    assert relative_error(lse, expected_lse[where]) < 5e-3


def test_rotations_of_different_layouts_are_refused() -> None:
    problem = make_small_problem(128, (CHUNK, LOCAL))
    queries = problem.queries(QueryBlocks((0,), 128))
    turned = queries.inter.transpose(0, 1).contiguous().transpose(0, 1)
    with pytest.raises(ValueError, match="same strides"):
        triton_prefill.attention(
            SegmentQueries(queries.intra, queries.successive, turned),
            QueryBlocks((0,), 128), problem.pages, STRIDE, SCALE,
        )  # fmt: skip


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("length", [1, 63, 123, 124, 129, 246, 247, 1000])
def test_decode_attention(length: int, dual: bool) -> None:
    problem = make_problem(length, dual)
    where = torch.tensor([length - 1])
    queries = problem.positions.queries(problem.q[where], where)
    output = dual_chunk.decode_attention(
        queries,
        problem.pages.memory,
        problem.pages.table.pages.tolist(),
        length,
        STRIDE if dual else None,
        SCALE,
    )
    expected, _ = reference.attention(problem.logits, problem.v)
    torch.testing.assert_close(output, expected[where].float(), rtol=1e-4, atol=1e-4)


@given(
    start=st.integers(0, 5000), rows=st.integers(1, 400), stride=st.none() | st.integers(1, 1000)
)
def test_spans_are_cut_at_every_border_and_nowhere_else(start, rows, stride) -> None:
    parts = list(split_at_chunks(Span(7, 7 + rows, start), stride))
    assert [p.first_row for p in parts] == [7, *(p.last_row for p in parts[:-1])]
    assert parts[-1].last_row == 7 + rows
    for part in parts:
        assert part.start - part.first_row == start - 7
        assert part.rows > 0
        if stride is not None:
            assert part.start // stride == (part.end - 1) // stride
    if stride is not None:
        assert all(part.start % stride == 0 for part in parts[1:])


@given(position=st.integers(0, 5000), size=st.integers(2, 600), data=st.data())
def test_bounds_tell_the_three_kinds_of_keys_apart(position: int, size: int, data) -> None:
    local = data.draw(st.integers(1, size - 1))
    stride = size - local
    bounds = KeyBounds.of(position, stride)
    key = data.draw(st.integers(0, position))
    apart = position // stride - key // stride
    assert (key < bounds.inter) == (apart >= 2)
    assert (bounds.inter <= key < bounds.successive) == (apart == 1)


@given(
    blocks=st.lists(st.integers(0, 50), min_size=1, max_size=6, unique=True),
    short=st.integers(1, 128),
)
def test_query_blocks_count_every_row_once(blocks: list[int], short: int) -> None:
    blocks.sort()
    rows = QueryBlocks(tuple(blocks), blocks[-1] * 128 + short)
    expected = [
        block * 128 + offset
        for block in blocks
        for offset in range(short if block == blocks[-1] else 128)
    ]
    assert rows.positions().tolist() == expected
    assert rows.num_rows == len(expected)
