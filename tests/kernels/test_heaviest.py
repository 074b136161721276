"""The heaviest columns: as many as each line wants, the first of equals, in their order."""

import pytest
import torch
from torch import Tensor

from longreach.kernels import sparse
from longreach.kernels.sparse import NOTHING, triton_heaviest

from .problem import DEVICE

COUNTS = [0, 1, 17, 300, 5000]


def numbers(kind: str, lines: int, n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    drawn = torch.rand(lines, n, generator=generator)
    if kind == "few levels":
        drawn = (drawn * 3).floor() / 7
    if kind == "zeros and tiny":
        drawn = torch.where(drawn < 0.5, 0.0, drawn * 1e-38)
    if kind == "far apart":
        drawn = (drawn * 60 - 30).exp2()
    return torch.where(torch.rand(lines, n, generator=generator) < 0.1, -1.0, drawn)


def expected(weights: Tensor, count: int) -> list[int]:
    order = sorted(range(len(weights)), key=lambda place: (-float(weights[place]), place))
    return sorted(place for place in order[:count] if weights[place] >= 0)


@pytest.mark.parametrize("kind", ["any", "few levels", "zeros and tiny", "far apart"])
@pytest.mark.parametrize("n", [1, 700, 4097])
def test_triton_takes_the_first_of_the_heaviest(kind: str, n: int) -> None:
    weights = numbers(kind, len(COUNTS), n)
    values, places = triton_heaviest.heaviest(
        weights.to(DEVICE), 30, torch.tensor(COUNTS, device=DEVICE), max(COUNTS)
    )
    assert places.shape == values.shape == (len(COUNTS), max(COUNTS))
    for line, count in enumerate(COUNTS):
        wanted = expected(weights[line], count)
        found = places[line].tolist()
        assert found == [place + 30 for place in wanted] + [NOTHING] * (len(found) - len(wanted))
        kept = values[line].cpu()
        assert torch.equal(kept[: len(wanted)], weights[line, wanted])
        assert (kept[len(wanted) :] == -1).all()


def test_triton_takes_places_from_a_table_and_rows_that_are_apart() -> None:
    weights = numbers("any", 3, 5000)
    table = torch.arange(15000, dtype=torch.int32).view(3, 5000) * 2
    values, places = triton_heaviest.heaviest(
        weights.to(DEVICE)[:, 40:], table.to(DEVICE)[:, 40:],
        torch.tensor([9, 9, 9], device=DEVICE), 9,
    )  # fmt: skip
    for line in range(3):
        wanted = expected(weights[line, 40:], 9)
        assert places[line].tolist() == table[line, 40:][wanted].tolist()
        assert torch.equal(values[line].cpu(), weights[line, 40:][wanted])


@pytest.mark.parametrize("n", [1, 700])
def test_portable_takes_as_many_and_as_heavy(n: int) -> None:
    weights = numbers("any", len(COUNTS), n)
    found = sparse.heaviest(weights, 30, COUNTS)
    for line, count in enumerate(COUNTS):
        wanted = expected(weights[line], count)
        places = found.places[line]
        assert places[: len(wanted)].tolist() == [place + 30 for place in wanted]
        assert (places[len(wanted) :] == NOTHING).all()
