"""Every kind of piece is met before the first request is."""

from pathlib import Path

import pytest
import torch

from longreach.kernels import sparse
from longreach.plugins.vllm import piece_attention
from longreach.plugins.vllm.model_attention import ModelAttention
from longreach.plugins.vllm.warm_up import kinds_of_pieces, warm_up
from tests.engine.checkpoints import make_checkpoint

from .steps import CPU, raw_config

DUAL = {
    "chunk_size": 1152, "local_size": 128, "original_max_position_embeddings": 1152,
    "sparse_attention_threshold": 2000,
}  # fmt: skip


@pytest.fixture
def model(tmp_path: Path) -> ModelAttention:
    folder = make_checkpoint(tmp_path, DUAL, sparse=(64, 128))
    return ModelAttention.of(raw_config(folder), 4, 2, 0)


def test_pieces_are_in_each_dual_chunk_and_at_the_end(model: ModelAttention) -> None:
    pieces = list(kinds_of_pieces(model, 6000))
    assert {piece.start // 1024 for piece in pieces} == {0, 1, 2, 5}
    assert {model.is_sparse(piece.length) for piece in pieces} == {True, False}
    assert any(piece.start % 128 for piece in pieces)
    assert pieces[-1].end == 6000


@pytest.mark.parametrize("longest", [1, 700, 5000])
def test_it_runs_for_any_length(
    model: ModelAttention, longest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    met = []
    attention = sparse.attention

    def observed(*arguments, **named):
        met.append(arguments)
        return attention(*arguments, **named)

    monkeypatch.setattr(piece_attention.sparse, "attention", observed)
    warm_up(model, longest, torch.float32, CPU)
    assert bool(met) == (longest > 2000)
