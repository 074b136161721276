"""Rows that are computed in steps, one after the other or in turns."""

from collections.abc import Generator

import pytest
import torch
from torch import Tensor

from longreach.engine.model.rows import RowSteps, finished

CPU, GPU = torch.device("cpu"), torch.device("cuda")
STEPS = RowSteps((slice(0, 3), slice(3, 5), slice(5, 6)))


def test_in_turns_nobody_goes_on_before_all_have_come_as_far() -> None:
    rows, seen = torch.arange(6.0), list[tuple[int, int]]()

    def work(own: slice) -> Generator[None, None, tuple[Tensor, ...]]:
        for phase in range(2):
            seen.append((phase, own.start))
            yield
        return rows[own] * 2, rows[own] + 1

    twice, more = STEPS.map_in_turns(work)
    assert seen == [(0, 0), (0, 3), (0, 5), (1, 0), (1, 3), (1, 5)]
    assert torch.equal(twice, rows * 2)
    assert torch.equal(more, rows + 1)
    seen.clear()
    alone = STEPS.map(lambda own: finished(work(own)))
    assert seen == [(0, 0), (1, 0), (0, 3), (1, 3), (0, 5), (1, 5)]
    assert all(torch.equal(one, other) for one, other in zip(alone, (twice, more), strict=True))


@pytest.mark.parametrize("num_rows", [0, 1, 1023, 2048, 3000, 8192, 8193, 32768])
@pytest.mark.parametrize("device", [CPU, GPU], ids=["cpu", "gpu"])
def test_turns_are_whole_blocks_and_hold_every_row(num_rows: int, device: torch.device) -> None:
    slices = RowSteps.in_turns(num_rows, device).slices
    assert [row for own in slices for row in range(num_rows)[own]] == list(range(num_rows))
    assert all(own.start % 128 == 0 for own in slices)
    if device == GPU:
        assert len(slices) == {8192: 4, 8193: 4, 32768: 4, 2048: 2, 3000: 2}.get(num_rows, 1)
