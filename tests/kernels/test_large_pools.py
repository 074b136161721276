"""Pools of more than 2^31 elements: what lies beyond must be found and written all the same."""

import pytest
import torch

from longreach.kernels import dual_chunk, sparse
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries, triton_prefill
from longreach.kernels.pages import LayerPages
from longreach.kernels.sparse import HeadBudget, triton_attention

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU's memory")

PAGES, KV_HEADS, HEAD_DIM = 16_500, 4, 128
USED, LENGTH = 8, 1000


@pytest.fixture(scope="module")
def pools() -> tuple[LayerPages, LayerPages]:
    """The same eight pages in a small pool, and at the end of one of 2.16e9 elements."""
    small = torch.randn(USED, KV_HEADS, 2, 128, HEAD_DIM, device="cuda", dtype=torch.bfloat16)
    large = small.new_empty(PAGES, *small.shape[1:])
    assert large.numel() > 2**31
    large[-USED:] = small
    last = range(PAGES - USED, PAGES)
    return LayerPages.of(small, range(USED)), LayerPages.of(large, last)


def test_prefill_and_selection(pools: tuple[LayerPages, LayerPages]) -> None:
    blocks = QueryBlocks((5, 6, 7), LENGTH)
    shape = (blocks.num_rows, 28, HEAD_DIM)
    rotations = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    queries = SegmentQueries(*rotations)
    last = queries.rows(slice(blocks.num_rows - 64, blocks.num_rows))
    results = []
    for pages in pools:
        sums = sparse.sums(last, LENGTH - 64, pages, 0, 384, 0.1, 7)
        chosen = sparse.by_bands(sums, [HeadBudget(100, 256)] * 28)
        results.append(
            [
                sums.columns,
                chosen.columns,
                *dual_chunk.attention(queries, blocks, pages, 384, 0.1),
                *triton_prefill.attention(queries, blocks, pages, 384, 0.1),
                *sparse.attention(queries, blocks, pages, 384, 0.1, chosen),
                *triton_attention.attention(queries, blocks, pages, 384, 0.1, chosen),
            ]
        )
    for near, far in zip(*results, strict=True):
        assert torch.equal(near, far)
