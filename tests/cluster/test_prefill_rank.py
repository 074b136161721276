"""A rank of a gang of one, in this process."""

from typing import Any

import numpy as np
import pytest
import torch

from longreach.cluster.prefill_rank import PrefillRank
from longreach.cluster.scheduler import Chunk
from longreach.engine.errors import OutOfMemoryError
from longreach.kernels import dual_chunk

from .conftest import make_settings


class Sender:
    """Takes pages and does nothing with them."""

    failure = None

    def push(self, *arguments: Any) -> None: ...
    def flush(self) -> None: ...
    def abandon(self) -> None: ...


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> PrefillRank:
    monkeypatch.setattr(PrefillRank, "_make_sender", lambda *arguments: Sender())
    settings = make_settings(1)
    prefill = settings.prefill.model_copy(update={"sequence_parallel": 1, "kv_cache_tokens": 2048})
    made = PrefillRank(settings.model_copy(update={"prefill": prefill}), 0)
    made.join("")
    return made


def test_a_chunk_that_needs_too_much_memory_leaves_the_rank_as_it_was(
    rank: PrefillRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = np.full(1500, 65, dtype=np.int32)
    expected = rank.run_chunk(Chunk("whole", 0, 1500, True), prompt, None).logits
    kernel = dual_chunk.attention

    def small_kernel(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    rank.run_chunk(Chunk("a", 0, 1024, False), prompt, None)
    monkeypatch.setattr(dual_chunk, "attention", small_kernel)
    with pytest.raises(OutOfMemoryError, match=r"1024 to 1500 .* lower prefill\.chunk_tokens"):
        rank.run_chunk(Chunk("a", 1024, 1500, True), None, None)
    monkeypatch.setattr(dual_chunk, "attention", kernel)
    after = rank.run_chunk(Chunk("b", 0, 1500, True), prompt, None).logits
    assert expected is not None
    assert after is not None
    np.testing.assert_array_equal(after, expected)
