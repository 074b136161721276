"""Warming up meets the chunks it should, and leaves nothing behind."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.local import LocalPrefill
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.prefill.warm_up import warm_up_prefill

from ..checkpoints import DUAL_CHUNK, make_checkpoint

STRIDE = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]
LONGEST = 4 * STRIDE + 77


def test_prompts_are_answered_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_checkpoint(tmp_path, dual_chunk=DUAL_CHUNK)
    prompt = np.random.default_rng(0).integers(0, 50, LONGEST, dtype=np.int32)
    expected = LocalPrefill(folder, LONGEST).logits(prompt, 128)
    warm = LocalPrefill(folder, LONGEST)
    starts: list[tuple[int, int]] = []
    run_chunk = Prefiller.run_chunk

    def noted(self: Prefiller, name: str, start: int, end: int) -> object:
        starts.append((start, end))
        return run_chunk(self, name, start, end)

    monkeypatch.setattr(Prefiller, "run_chunk", noted)
    warm_up_prefill(warm.prefiller, LONGEST, 128, STRIDE)
    monkeypatch.undo()
    assert starts[-1][1] == LONGEST
    for border in (STRIDE, 2 * STRIDE):
        assert any(start <= border < end for start, end in starts)
    assert warm.pool.num_free == warm.pool.num_pages
    assert torch.equal(warm.logits(prompt, 128), expected)
