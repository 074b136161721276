"""The heaviest columns: as many as each line wants, in their order."""

import pytest
import torch
from torch import Tensor

from longreach.kernels import sparse
from longreach.kernels.sparse import NOTHING

from .problem import DEVICE

COUNTS = [0, 1, 17, 300, 5000]


def numbers(lines: int, n: int) -> Tensor:
    """All different, and some that are none."""
    generator = torch.Generator().manual_seed(n)
    order = torch.stack([torch.randperm(n, generator=generator) for _ in range(lines)])
    none = torch.rand(lines, n, generator=generator) < 0.1
    return torch.where(none, -1.0, order.float() / n)


def expected(weights: Tensor, count: int) -> list[int]:
    order = sorted(range(len(weights)), key=lambda place: (-float(weights[place]), place))
    return sorted(place for place in order[:count] if weights[place] >= 0)


@pytest.mark.parametrize("n", [1, 700, 4097])
def test_as_many_as_each_line_wants_in_their_order(n: int) -> None:
    weights = numbers(len(COUNTS), n)
    found = sparse.heaviest(weights.to(DEVICE), 30, COUNTS)
    assert found.places.shape == found.weights.shape == (len(COUNTS), max(COUNTS))
    for line, count in enumerate(COUNTS):
        wanted = expected(weights[line], count)
        places, values = found.places[line].tolist(), found.weights[line].cpu()
        rest = max(COUNTS) - len(wanted)
        assert places == [place + 30 for place in wanted] + [NOTHING] * rest
        assert torch.equal(values[: len(wanted)], weights[line, wanted])
        assert (values[len(wanted) :] == -1).all()


def test_parts_follow_one_another() -> None:
    """As ranks send them: each line's end is filled up in every part."""
    weights = numbers(1, 900).view(3, 3, 100)  # [parts, lines, n]
    table = torch.arange(weights.numel(), dtype=torch.int32).view(3, 3, -1)
    wanted = [1, 4, 9]
    found = sparse.heaviest(weights.to(DEVICE), table.to(DEVICE), wanted)
    flat, listed = (each.transpose(0, 1).flatten(1) for each in (weights, table))
    for line, count in enumerate(wanted):
        best = expected(flat[line], count)
        assert found.places[line, : len(best)].tolist() == listed[line, best].tolist()
        assert torch.equal(found.weights[line, : len(best)].cpu(), flat[line, best])
