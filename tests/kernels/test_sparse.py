"""Selection and sparse attention against the definition."""

import numpy as np
import pytest
import torch

from longreach.kernels import sparse
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries
from longreach.kernels.dual_chunk.reference import attention as exact_attention
from longreach.kernels.sparse import HeadBudget, Selection, reference
from longreach.kernels.sparse import selection as selection_module

from .problem import CHUNK, LOCAL, SCALE, make_problem

STRIDE = CHUNK - LOCAL

SELECTIONS = [
    Selection(np.array([0, 1, 5, 130, 600, 999]), np.array([0])),
    Selection(np.array([0]), np.array([0, 3])),
    Selection(np.arange(1000), np.array([0, 1, 2, 7])),
    Selection(np.array([127, 128, 400]), np.array([0, 5, 6])),
]


@pytest.mark.parametrize("dual", [True, False])
@pytest.mark.parametrize(("length", "blocks"), [(1000, [0, 1, 4, 7]), (897, [6, 7]), (111, [0])])
def test_sparse_attention_sees_exactly_what_was_selected(length, blocks, dual: bool) -> None:
    problem = make_problem(length, dual)
    selections = [
        Selection(each.verticals[each.verticals < length], each.bands) for each in SELECTIONS
    ]
    masks = torch.stack(
        [
            reference.visible(set(each.verticals.tolist()), set(each.bands.tolist()), length)
            for each in selections
        ]
    )
    logits = problem.logits.masked_fill(~masks, -torch.inf)
    expected, expected_lse = exact_attention(logits, problem.v)
    rows = QueryBlocks(blocks, length)
    output, lse = sparse.attention(
        problem.queries(rows), rows, problem.pages, STRIDE if dual else None, SCALE, selections
    )
    where = rows.positions()
    torch.testing.assert_close(output, expected[where].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse[where].float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("end", [1000, 1024])
def test_visible_keys_are_the_mask(selection: Selection, end: int) -> None:
    mask = reference.visible(set(selection.verticals.tolist()), set(selection.bands.tolist()), end)
    for block in range(8):
        keys = sparse.visible_keys(selection, block, end)
        last_row = min(end, (block + 1) * 128) - 1
        assert keys.tolist() == mask[last_row].nonzero().flatten().tolist()


@pytest.mark.parametrize("keys_at_once", [64, 200, 4096])
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (63, 63), (640, 64), (1000, 64), (300, 100)])
def test_sums_are_those_of_the_definition(monkeypatch, length, rows, keys_at_once) -> None:
    monkeypatch.setattr(selection_module, "_KEYS_AT_ONCE", keys_at_once)
    problem = make_problem(length, dual=False)
    first = length - rows
    where = torch.arange(first, length)
    queries = problem.positions.selection_queries(problem.q[where], where)
    for head in range(4):
        scorer = selection_module._Scorer(
            queries.heads(slice(head, head + 1)), first, problem.pages, head // 2, None, SCALE
        )
        columns, bands = scorer.sums(scorer.log_sum_exp())
        expected_columns, expected_bands = reference.sums(problem.logits[head, first:], first)
        torch.testing.assert_close(columns[0], expected_columns.float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bands[0], expected_bands.float(), rtol=1e-4, atol=1e-5)


def test_selection_keeps_what_must_be_kept_within_the_budget() -> None:
    problem = make_problem(1000, dual=True)
    where = torch.arange(936, 1000)
    queries = problem.positions.selection_queries(problem.q[where], where)
    budgets = [HeadBudget(50, 200), HeadBudget(10, 1)]
    chosen = sparse.select(
        queries.heads(slice(0, 2)), 936, problem.pages, 0, STRIDE, SCALE, budgets
    )
    assert [len(each.verticals) for each in chosen] == [50, 30]
    assert [len(each.bands) for each in chosen] == [2, 1]
    for each in chosen:
        assert set(range(30)) <= set(each.verticals.tolist())
        assert each.bands[0] == 0
        assert (np.diff(each.verticals) > 0).all()


def test_selection_finds_a_planted_column_and_a_planted_diagonal() -> None:
    problem = make_problem(1000, dual=False)
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(16), dim=0)
    own = torch.randn(64, 1, 16)
    rows = own + 4 * common
    plant = {936 + row - 700: own[row, 0] * 3 for row in range(64)} | {431: common * 12}
    for token, key in plant.items():
        page, offset = divmod(token, 128)
        problem.pages.memory[int(problem.pages.table[page]), 0, 0, offset] = key
    queries = SegmentQueries(rows, rows, rows)
    [chosen] = sparse.select(queries, 936, problem.pages, 0, None, SCALE, [HeadBudget(100, 256)])
    assert 431 in chosen.verticals
    assert 700 // 128 in chosen.bands
