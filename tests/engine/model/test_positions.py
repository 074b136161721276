"""Rotations that are spared are those that attention does not look at, or that are equal."""

from dataclasses import replace

import pytest
import torch

from longreach.engine.model.config import DualChunk, ModelConfig
from longreach.engine.model.positions import RotaryPositions
from longreach.kernels import dual_chunk
from longreach.kernels.dual_chunk import BLOCK_ROWS, QueryBlocks
from longreach.kernels.pages import LayerPages, to_pages

from ..checkpoints import make_checkpoint

DUAL = DualChunk(chunk_size=320, local_size=100, original_max_position_embeddings=320)
STRIDE = 220


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> ModelConfig:
    return ModelConfig.from_folder(make_checkpoint(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize("dual", [None, DUAL])
@pytest.mark.parametrize(
    ("start", "end"), [(0, 128), (0, 256), (128, 384), (384, 440), (384, 640), (384, 768)]
)
def test_knowing_where_rows_lie_changes_no_attention(
    config: ModelConfig, dual: DualChunk | None, start: int, end: int
) -> None:
    positions = RotaryPositions(replace(config, dual_chunk=dual))
    generator = torch.Generator().manual_seed(1)
    where = torch.arange(start, end)
    q = torch.randn(end - start, 4, 16, generator=generator)
    k, v = torch.randn(2, end, 2, 16, generator=generator)
    pages = to_pages(positions.keys(k, torch.arange(end)), v)
    table = LayerPages.of(pages, range(len(pages)))
    blocks = QueryBlocks(tuple(range(start // BLOCK_ROWS, len(pages))), end)
    expected, actual = (
        dual_chunk.attention(rotations.rotate(q), blocks, table, positions.stride, 0.25)[0]
        for rotations in (
            positions.rotations(where),
            positions.rotations(where, range(start, end)),
        )
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_equal_rotations_are_made_once(config: ModelConfig) -> None:
    positions = RotaryPositions(replace(config, dual_chunk=DUAL))
    q = torch.randn(64, 4, 16)

    def tensors(start: int) -> int:
        within = range(start, start + 64)
        rotated = positions.rotations(torch.arange(start, start + 64), within).rotate(q)
        return len({id(each) for each in (rotated.intra, rotated.successive, rotated.inter)})

    assert tensors(100) == 1  # in the first dual chunk positions are plain
    assert tensors(STRIDE) == 2  # no keys are two dual chunks away yet
    assert tensors(2 * STRIDE) == 3
    assert tensors(2 * STRIDE + 100) == 2  # all successive positions are clamped to the farthest


def test_the_first_dual_chunk_needs_no_inter_rows_of_selection(config: ModelConfig) -> None:
    positions = RotaryPositions(replace(config, dual_chunk=DUAL))
    q = torch.randn(64, 4, 16)
    where = torch.arange(STRIDE + 150, STRIDE + 214)
    known = positions.selection_rotations(where, range(STRIDE + 150, STRIDE + 214)).rotate(q)
    expected = positions.selection_queries(q, where)
    torch.testing.assert_close(known.intra, expected.intra, rtol=0, atol=0)
    torch.testing.assert_close(known.successive, expected.successive, rtol=0, atol=0)
