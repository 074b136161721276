"""Pages that kernels would misread are refused by whatever launches one."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from longreach.kernels.dual_chunk import (
    QueryBlocks,
    SegmentQueries,
    gluon_prefill,
    triton_decode,
    triton_prefill,
)
from longreach.kernels.dual_chunk.decode_plan import DecodePlan
from longreach.kernels.dual_chunk.segments import Rotation
from longreach.kernels.elementwise import triton_elementwise
from longreach.kernels.pages import LayerPages, check_pages
from longreach.kernels.sparse import ALL_KEYS, Selections, triton_attention, triton_sums

HEAD_DIM = 64
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def vectors(rows: int) -> Tensor:
    return torch.zeros(rows, 1, HEAD_DIM, dtype=torch.float16, device=DEVICE)


def queries(rows: int) -> SegmentQueries:
    return SegmentQueries(*[vectors(rows)] * 3)


def prefill(memory: Tensor) -> object:
    blocks = QueryBlocks((0,), 128)
    return triton_prefill.attention(queries(128), blocks, LayerPages.of(memory, [0]), None, 1.0)


def sparse_attention(memory: Tensor) -> object:
    blocks, chosen = QueryBlocks((0,), 128), Selections.of([[0]], [[0]])
    chosen = Selections(chosen.columns.to(DEVICE), chosen.distances.to(DEVICE))
    return triton_attention.attention(
        queries(128), blocks, LayerPages.of(memory, [0]), None, 1.0, chosen
    )


def sums(memory: Tensor) -> object:
    pages = LayerPages.of(memory, [0])
    return triton_sums.KeyScores(queries(64), 0, pages, 0, None, 1.0, 1, ALL_KEYS).all_sums()


def decode(memory: Tensor) -> object:
    plan = DecodePlan.allocate(1, 1, DEVICE)
    tables = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    scales = torch.ones(1, device=DEVICE)
    return triton_decode.decode_attention(queries(1), memory, tables, plan, None, scales)


def write(memory: Tensor) -> object:
    slots = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    turn = Rotation(*torch.zeros(2, 1, HEAD_DIM // 2, device=DEVICE))
    return triton_elementwise.write_pages(memory, slots, vectors(1), vectors(1), turn)


launchers = pytest.mark.parametrize(
    "launch", [prefill, gluon_prefill.swizzled_tiles, sparse_attention, sums, decode, write]
)


@launchers
def test_pages_whose_tokens_lie_apart_are_refused(launch: Callable[[Tensor], object]) -> None:
    wider = torch.zeros(2, 1, 2, 128, 2 * HEAD_DIM, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match="not contiguous"):
        launch(wider[..., :HEAD_DIM])


@launchers
def test_tokens_before_heads_are_refused(launch: Callable[[Tensor], object]) -> None:
    memory = torch.zeros(2, 128, 1, 2, HEAD_DIM, dtype=torch.float16, device=DEVICE)
    with pytest.raises(ValueError, match=r"must be \[pages, kv_heads, 2, 128, d\]"):
        launch(memory)


def test_pages_apart_are_for_those_who_are_told_how_far() -> None:
    some_heads = torch.zeros(3, 4, 2, 128, HEAD_DIM)[:, 1:3]
    check_pages(some_heads, pages_apart=True)
    with pytest.raises(ValueError, match="not contiguous"):
        check_pages(some_heads)
    check_pages(some_heads.contiguous())
