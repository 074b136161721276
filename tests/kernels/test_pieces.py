"""Attention over pieces of keys: merged, it is attention over all of them, whoever has which."""

import itertools

import pytest
import torch

from longreach.kernels.dual_chunk import QueryBlocks, pieces, reference, triton_pieces
from longreach.kernels.dual_chunk.pieces import KeyPieces, PartialResults

from .poison import poison_fresh_memory
from .problem import CHUNK, DEVICE, LOCAL, SCALE, make_problem, make_small_problem, relative_error

STRIDE = CHUNK - LOCAL

cases = pytest.mark.parametrize(
    ("length", "blocks"), [(1, (0,)), (247, (0, 1)), (1000, (6, 7)), (1000, (3, 7)), (640, (4,))]
)


@pytest.fixture(autouse=True)
def many_small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "_LEAST_TILES", 1)
    monkeypatch.setattr(pieces, "_MOST_PIECES", 5)


def together(parts: list[PartialResults]) -> PartialResults:
    return PartialResults(*(torch.cat(each) for each in zip(*map(_fields, parts), strict=True)))


def _fields(part: PartialResults) -> tuple[torch.Tensor, torch.Tensor]:
    return part.output, part.lse


@cases
@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize("ranks", [1, 3])
def test_parts_of_the_pieces_are_attention_over_all_keys(
    length: int, blocks: tuple[int, ...], dual: bool, ranks: int
) -> None:
    problem = make_problem(length, dual)
    rows = QueryBlocks(blocks, length)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    every = KeyPieces.of(length)
    parts = [
        pieces.attention(
            problem.queries(rows), rows, problem.pages, STRIDE if dual else None, SCALE,
            every.part(rank, ranks),
        )
        for rank in range(ranks)
    ]  # fmt: skip
    whole, where = together(parts), rows.positions()
    assert len(whole.lse) == len(every)
    torch.testing.assert_close(
        whole.merged(torch.float32), expected[where].float(), rtol=1e-4, atol=1e-4
    )
    torch.testing.assert_close(
        whole.lse.logsumexp(0), expected_lse[where].float(), rtol=1e-4, atol=1e-4
    )


@cases
@pytest.mark.parametrize("chunk", [(200, 77), (384, 128), None])
def test_triton_pieces(
    monkeypatch: pytest.MonkeyPatch, length: int, blocks: tuple[int, ...], chunk
) -> None:
    problem = make_small_problem(length, chunk)
    rows = QueryBlocks(blocks, length)
    expected, expected_lse = reference.attention(problem.logits, problem.v)
    queries = problem.queries(rows)
    poison_fresh_memory(monkeypatch)
    result = PartialResults(
        *triton_pieces.attention(
            queries, rows, problem.pages, None if chunk is None else chunk[0] - chunk[1],
            problem.scale, KeyPieces.of(length).ranges(),
        )
    )  # fmt: skip
    where = rows.positions()
    assert result.output.device.type == DEVICE.type if isinstance(DEVICE, torch.device) else True
    assert relative_error(result.merged(torch.float32), expected[where]) < 5e-3
    assert relative_error(result.lse.logsumexp(0), expected_lse[where]) < 5e-3


@pytest.mark.parametrize("length", [1, 128, 129, 4095, 4096, 4097, 70_000, 1_000_000])
@pytest.mark.parametrize("ranks", [1, 3, 8])
def test_every_key_is_in_one_piece_of_one_part(
    monkeypatch: pytest.MonkeyPatch, length: int, ranks: int
) -> None:
    monkeypatch.undo()
    every = KeyPieces.of(length)
    ranges = [r for rank in range(ranks) for r in every.part(rank, ranks).ranges()]
    assert ranges == every.ranges()
    assert (ranges[0][0], ranges[-1][1]) == (0, length)
    assert all(end == start for (_, end), (start, _) in itertools.pairwise(ranges))
    assert all(start % 128 == 0 and start < end for start, end in ranges)
