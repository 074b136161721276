"""Selection and sparse attention against the definition: portable, and Triton's interpreted."""

import functools
import math
from dataclasses import replace
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from longreach.kernels import sparse
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries, triton_prefill
from longreach.kernels.dual_chunk.reference import attention as exact_attention
from longreach.kernels.pages import LayerPages
from longreach.kernels.sparse import (
    NOTHING,
    HeadBudget,
    Selections,
    Sums,
    portable,
    portable_batches,
    portable_sums,
    reference,
    triton_attention,
    triton_sums,
)

from .poison import poison_fresh_memory
from .problem import (
    CHUNK,
    DEVICE,
    LOCAL,
    SCALE,
    Problem,
    make_problem,
    make_small_problem,
    relative_error,
)

STRIDE = CHUNK - LOCAL

COLUMNS = [[0, 1, 5, 130, 600, 999], [0], list(range(1000)), [127, 128, 400]]
DISTANCES = [[0, 1], [0, 3, 4], [0, 1, 2, 3, 7], [0, 5, 6]]


def selections_below(length: int) -> Selections:
    """Those above, with columns before `length` alone."""
    return Selections.of([[c for c in each if c < length] for each in COLUMNS], DISTANCES)


def expected_attention(problem: Problem, selections: Selections):
    masks = []
    for head in range(len(selections.columns)):
        columns, distances = (set(each.tolist()) for each in selections.of_head(head))
        masks.append(reference.visible(columns, distances, problem.length))
    return exact_attention(problem.logits.masked_fill(~torch.stack(masks), -torch.inf), problem.v)


def to_device(selections: Selections) -> Selections:
    return Selections(selections.columns.to(DEVICE), selections.distances.to(DEVICE))


# Of the chunks, the first does not consist of whole blocks. Blocks are attended to together, one by
# one, or both.
@pytest.mark.parametrize("logit_bytes", [1, 5 << 20])
@pytest.mark.parametrize("chunk", [(200, 77), (384, 128), None])
@pytest.mark.parametrize(
    ("length", "blocks"),
    [(1000, (0, 1, 4, 7)), (1024, (0, 2, 3, 4, 5, 7)), (897, (6, 7)), (111, (0,))],
)
def test_portable_attention_sees_exactly_what_was_selected(
    monkeypatch, length, blocks, chunk, logit_bytes: int
) -> None:
    monkeypatch.setattr(portable_batches, "_LOGIT_BYTES", logit_bytes)
    poison_fresh_memory(monkeypatch)
    problem = make_problem(length, chunk is not None, chunk=chunk or (CHUNK, LOCAL))
    selections = selections_below(length)
    expected, expected_lse = expected_attention(problem, selections)
    rows = QueryBlocks(blocks, length)
    output, lse = portable_output(problem, rows, chunk, problem.pages, selections)
    where = rows.positions()
    torch.testing.assert_close(output, expected[where].float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lse, expected_lse[where].float(), rtol=1e-4, atol=1e-4)


def test_a_block_for_which_nothing_was_selected_sees_its_own_tile() -> None:
    chunk, rows = (384, 128), QueryBlocks((0, 1, 2), 384)
    problem = make_problem(384, True, chunk=chunk)
    nothing = Selections.of([[]] * 4, [[0]] * 4)
    expected, _ = expected_attention(problem, nothing)
    output, _ = portable_output(problem, rows, chunk, problem.pages, nothing)
    torch.testing.assert_close(output, expected.float(), rtol=1e-4, atol=1e-4)


def portable_output(
    problem: Problem, rows: QueryBlocks, chunk, pages: LayerPages, selections: Selections
) -> tuple[Tensor, Tensor]:
    stride = None if chunk is None else chunk[0] - chunk[1]
    return portable.attention(problem.queries(rows), rows, pages, stride, SCALE, selections)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_portable_attention_reads_pages_of_bfloat16(dtype: torch.dtype) -> None:
    """In its own type and in float32; what comes out is rounded once."""
    chunk, rows = (384, 128), QueryBlocks((0, 1, 4, 7), 1000)
    problem = make_problem(1000, True, dtype=torch.bfloat16, chunk=chunk)
    selections = selections_below(1000)
    expected, expected_lse = expected_attention(problem, selections)
    pages = replace(problem.pages, read_as=dtype)
    stride = chunk[0] - chunk[1]
    queries = problem.queries(rows).to(dtype)
    output, lse = portable.attention(queries, rows, pages, stride, SCALE, selections)
    assert output.dtype == dtype
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    assert relative_error(lse, expected_lse[where]) < 5e-3


def triton_output(problem: Problem, rows: QueryBlocks, chunk, selections: Selections):
    return triton_attention.attention(
        problem.queries(rows), rows, problem.pages,
        None if chunk is None else chunk[0] - chunk[1], problem.scale, to_device(selections),
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [(200, 77), (384, 128), None])
@pytest.mark.parametrize(("length", "blocks"), [(1000, (1, 4, 7)), (897, (6, 7)), (111, (0,))])
def test_triton_attention_sees_exactly_what_was_selected(
    monkeypatch, length, blocks, chunk
) -> None:
    problem = make_small_problem(length, chunk)
    selections = selections_below(length)
    expected, expected_lse = expected_attention(problem, selections)
    rows = QueryBlocks(blocks, length)
    poison_fresh_memory(monkeypatch)
    output, lse = triton_output(problem, rows, chunk, selections)
    where = rows.positions()
    assert relative_error(output, expected[where]) < 5e-3
    assert relative_error(lse, expected_lse[where]) < 5e-3


def test_selecting_nothing_leaves_each_block_its_own_tile() -> None:
    problem = make_small_problem(300, (384, 128))
    nothing = Selections.of([[]] * 4, [[0]] * 4)
    expected, _ = expected_attention(problem, nothing)
    rows = QueryBlocks((0, 1, 2), 300)
    output, _ = triton_output(problem, rows, (384, 128), nothing)
    assert relative_error(output, expected) < 5e-3


def test_selecting_everything_is_dense_attention() -> None:
    problem = make_small_problem(600, (384, 128))
    rows = QueryBlocks((3, 4), 600)
    dense, dense_lse = triton_prefill.attention(
        problem.queries(rows), rows, problem.pages, 256, problem.scale
    )
    for everything in (
        Selections.of([[]] * 4, [list(range(5))] * 4),
        Selections.of([list(range(600))] * 4, [list(range(5))] * 4),
    ):
        output, lse = triton_output(problem, rows, (384, 128), everything)
        assert relative_error(output, dense.cpu()) < 2e-3
        assert relative_error(lse, dense_lse.cpu()) < 1e-5


@pytest.mark.parametrize("end", [1000, 1024])
@pytest.mark.parametrize("head", range(4))
def test_visible_keys_are_the_mask(head: int, end: int) -> None:
    selections = selections_below(end)
    mask = reference.visible(set(COLUMNS[head]), set(DISTANCES[head]), end)
    for block in range(8):
        keys = sparse.visible_keys(selections, head, block, end)
        last_row = min(end, (block + 1) * 128) - 1
        assert keys.tolist() == mask[last_row].nonzero().flatten().tolist()


def all_sums(
    version: ModuleType, queries: SegmentQueries, first: int, pages: LayerPages, *rest: Any
) -> Sums:
    """`rest` are the first head, the stride, the scale, the group; heavy, and diagonals."""
    first_head, stride, scale, group, *wanted = rest
    where = (queries, first, pages, first_head, stride, scale, group, sparse.ALL_KEYS)
    return version.KeyScores(*where).all_sums(*wanted)


@functools.cache
def defined_sums(length: int, rows: int) -> list[tuple[Tensor, Tensor]]:
    """Of the columns and diagonals of each head of a problem, which takes seconds."""
    logits = make_problem(length, dual=False).logits[:, length - rows :]
    return [reference.sums(own, length - rows) for own in logits]


def check_sums(actual: Sums, problem: Problem, rows: int, heavy: float, tolerance: float) -> None:
    first = problem.length - rows
    for head in range(problem.q.shape[1]):
        columns, diagonals = defined_sums(problem.length, rows)[head]
        torch.testing.assert_close(
            actual.columns[head].cpu(), columns.float(), rtol=tolerance, atol=tolerance
        )
        assert actual.diagonals is not None
        torch.testing.assert_close(
            actual.diagonals[head].cpu(), diagonals.float(), rtol=tolerance, atol=tolerance
        )
        logits = problem.logits[head, first:]
        weights = logits.softmax(-1)
        is_heavy = weights.clamp(max=heavy / 8).sum(0) >= heavy
        if math.isfinite(heavy):
            assert actual.heavy_columns is not None
            torch.testing.assert_close(
                actual.heavy_columns[head].cpu(), (columns * is_heavy).float(),
                rtol=tolerance, atol=tolerance,
            )  # fmt: skip
        weights = weights.masked_fill(is_heavy, 0.0)
        bands = torch.zeros(-(-problem.length // 128), dtype=torch.float64)
        distance = torch.arange(first, problem.length)[:, None] - torch.arange(problem.length)
        bands.index_add_(0, distance.clamp(min=0).flatten() // 128, weights.flatten())
        torch.testing.assert_close(
            actual.bands[head].cpu(), bands.float(), rtol=tolerance, atol=tolerance
        )


@pytest.mark.parametrize("scores_at_once", [1, 2**15, 2**18])
@pytest.mark.parametrize(("length", "rows"), [(1, 1), (63, 63), (640, 64), (1000, 64), (300, 100)])
def test_portable_sums_are_those_of_the_definition(
    monkeypatch, length, rows, scores_at_once
) -> None:
    monkeypatch.setattr(portable_sums, "_SCORES_AT_ONCE", scores_at_once)
    problem = make_problem(length, dual=False)
    for heavy in (math.inf, 0.2):
        actual = all_sums(
            portable_sums,
            problem.last_queries(rows),
            length - rows,
            problem.pages,
            0,
            None,
            SCALE,
            2,
            heavy,
            True,
        )
        check_sums(actual, problem, rows, heavy, 1e-4)


@pytest.mark.parametrize(("length", "rows"), [(1, 1), (63, 63), (640, 64), (1000, 64), (300, 50)])
def test_triton_sums_are_those_of_the_definition(length, rows) -> None:
    problem = make_problem(length, dual=False, device=DEVICE)
    actual = all_sums(
        triton_sums,
        problem.last_queries(rows),
        length - rows,
        problem.pages,
        0,
        None,
        SCALE,
        2,
        0.2,
        True,
    )
    check_sums(actual, problem, rows, 0.2, 1e-3)


@pytest.mark.parametrize("version", [portable_sums, triton_sums])
@pytest.mark.parametrize(("length", "rows", "parts"), [(1000, 64, 3), (700, 16, 2), (100, 64, 4)])
@pytest.mark.parametrize("dual", [True, False])
def test_parts_of_the_keys_are_all_of_them_together(
    monkeypatch, version: ModuleType, length: int, rows: int, parts: int, dual: bool
) -> None:
    """Ranks that deal the keys choose, bit for bit, what one process does."""
    monkeypatch.setattr(triton_sums, "_STRETCH", 2)
    triton_sums._work.cache_clear()
    problem = make_problem(length, dual, device=DEVICE)
    where = (problem.last_queries(rows), length - rows, problem.pages, 0, STRIDE if dual else None)

    def scores(part: sparse.KeyPart) -> sparse.KeyScores:
        return version.KeyScores(*where, SCALE, 2, part)

    whole = scores(sparse.ALL_KEYS)
    lse = whole.log_sum_exps()
    expected = whole.sums(lse)
    scored = [scores(sparse.KeyPart(number, parts)) for number in range(parts)]
    own = [each.log_sum_exps() for each in scored]
    counts = scored[0].counts()
    assert [part.shape[1] for part in own] == counts
    most = max(counts)
    padded = [
        torch.nn.functional.pad(part, (0, 0, 1, most - part.shape[1]), value=math.nan)
        for part in own
    ]
    every = sparse.in_order(torch.stack(padded), counts, 1)
    found = [each.sums(every) for each in scored]
    columns = torch.cat([part.columns for part in found], 1)
    for each, part in zip(scored, found, strict=True):
        assert each.sums(every, bands=False).columns.equal(part.columns)
    firsts = [0, *np.cumsum([each.num_keys for each in scored])]
    assert [each.first_key for each in scored if each.num_keys] == [
        first for first, each in zip(firsts, scored, strict=False) if each.num_keys
    ]
    bands = torch.stack([part.bands for part in found]).sum(0)
    if version is triton_sums:
        assert torch.equal(every, lse)
        assert torch.equal(columns, expected.columns)
    torch.testing.assert_close(columns, expected.columns, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(bands, expected.bands, rtol=1e-4, atol=1e-5)
    triton_sums._work.cache_clear()


@pytest.mark.parametrize("in_order", [True, False])
def test_candidates_of_parts_are_chosen_from_as_from_all_columns(in_order: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    columns, bands = torch.rand(3, 900, generator=generator), torch.rand(3, 8, generator=generator)
    budgets = [HeadBudget(31, 128), HeadBudget(200, 300), HeadBudget(1000, 128)]
    expected = sparse.by_bands(Sums(columns, bands, None, None, 64), budgets)
    most = max(sparse.free_counts(budgets))
    parts = [
        sparse.column_candidates(columns[:, first:last], first, budgets)
        if in_order
        else sparse.part_candidates(columns[:, first:last], first, most)
        for first, last in ((0, 20), (20, 256), (256, 256), (256, 900))
    ]
    together = sparse.heaviest(
        torch.cat([part.weights for part in parts], 1),
        torch.cat([part.places for part in parts], 1),
        sparse.free_counts(budgets),
    )
    chosen = sparse.choose_by_bands(together, bands, budgets, [900] * 3)
    assert chosen.distances.shape[1] == sparse.band_tiles(budgets, 8)
    for head in range(3):
        for ours, whole in zip(chosen.of_head(head), expected.of_head(head), strict=True):
            assert ours.tolist() == whole.tolist()


def test_queries_may_be_wider_than_keys() -> None:
    problem = make_small_problem(300, None)
    last = problem.last_queries(64)
    wide = SegmentQueries(*(each.float() for each in (last.intra, last.successive, last.inter)))
    narrow, same = (
        all_sums(triton_sums, each, 236, problem.pages, 0, None, SCALE, 2) for each in (wide, last)
    )
    assert torch.equal(narrow.columns, same.columns)


def last_weights(problem: Problem, rows: int, stride: int) -> Tensor:
    """What the last rows look at across dual chunks, float64 [heads, rows, keys]."""
    keys, _ = problem.pages.read(0, problem.length)
    keys = keys.double().repeat_interleave(problem.group, 0)
    key, query = torch.arange(problem.length), torch.arange(problem.length)[-rows:, None]
    apart = query // stride - key // stride
    last = problem.last_queries(rows)
    intra, successive, inter = (
        torch.einsum("rhd,hkd->hrk", each.double(), keys) * problem.scale
        for each in (last.intra, last.successive, last.inter)
    )
    logits = torch.where(apart == 0, intra, torch.where(apart == 1, successive, inter))
    return logits.masked_fill(key > query, -torch.inf).softmax(-1)


def clear_limit(weights: Tensor) -> float:
    """A limit for heavy columns that some reach and some do not, and none lies near.

    Which side of the limit a column lies on must not be up to the order of float sums.
    """
    best, margin = math.nan, 0.0
    for limit in np.geomspace(0.02, 4, 400):
        reached = weights.clamp(max=limit / 8).sum(1) / limit
        nearest = float((reached - 1).abs().min())
        if nearest > margin and (reached >= 1).sum() >= 2:
            best, margin = float(limit), nearest
    assert margin > 0.01
    return best


@pytest.mark.parametrize("chunk", [(200, 77), (384, 128)])
@pytest.mark.parametrize(
    ("length", "rows", "group"),
    [(270, 64, 2), (1000, 64, 2), (555, 40, 2), (270, 64, 7), (300, 20, 5), (450, 12, 7)],
)
def test_both_sum_alike_across_dual_chunks(length, rows, group, chunk) -> None:
    stride = chunk[0] - chunk[1]
    # Some of the heads of both KV heads, as a rank of a gang would.
    heads = slice(group - 1, 2 * group - 1)
    problem = make_problem(length, dual=True, heads=2 * group, chunk=chunk)
    heavy = clear_limit(last_weights(problem, rows, stride)[heads])
    where = (problem.last_queries(rows), length - rows, problem.pages)
    expected = all_sums(portable_sums, *where, 0, stride, SCALE, group, heavy, True)
    problem = make_problem(length, dual=True, heads=2 * group, chunk=chunk, device=DEVICE)
    actual = all_sums(triton_sums, 
        problem.last_queries(rows).heads(heads), length - rows, problem.pages, heads.start, stride,
        SCALE, group, heavy, True,
    )  # fmt: skip
    for one, other in (
        (actual.columns, expected.columns),
        (actual.bands, expected.bands),
        (actual.heavy_columns, expected.heavy_columns),
        (actual.diagonals, expected.diagonals),
    ):
        assert one is not None
        assert other is not None
        # Both sum in float32, in another order and over scores that are rounded another way.
        torch.testing.assert_close(one.cpu(), other[heads], rtol=1e-3, atol=1e-3)


def random_sums(length: int, heads: int = 3) -> Sums:
    generator = torch.Generator().manual_seed(length)
    diagonals = torch.rand(heads, length, generator=generator)
    bands = torch.stack([each.sum(1) for each in diagonals.split(128, 1)], 1)
    return Sums(torch.rand(heads, length, generator=generator), bands, None, diagonals, 64)


def test_bands_keep_what_must_be_kept_within_the_budget() -> None:
    budgets = [HeadBudget(50, 200), HeadBudget(10, 1), HeadBudget(5000, 5000)]
    chosen = sparse.by_bands(random_sums(1000), budgets)
    columns, distances = zip(*(chosen.of_head(head) for head in range(3)), strict=True)
    assert [len(each) for each in columns] == [50, 30, 1000]
    assert len(distances[0]) in (3, 4)
    assert distances[1].tolist() == [0, 1]
    assert distances[2].tolist() == list(range(8))
    for each in columns:
        assert each[:30].tolist() == list(range(30))
        assert (np.diff(each) > 0).all()


def check_heaviest(chosen: list[int], weights: Tensor, count: int, forced: int) -> None:
    """The first `forced`, and as many others as budgets allow, none lighter than one left out."""
    size = len(weights)
    assert len(set(chosen)) == len(chosen) == min(max(count, forced), size)
    assert set(range(min(forced, size))) <= set(chosen)
    others = torch.zeros(size, dtype=torch.bool)
    others[chosen] = True
    taken, left = weights[forced:][others[forced:]], weights[forced:][~others[forced:]]
    if len(taken) and len(left):
        assert taken.min() >= left.max()


@settings(max_examples=200)
@given(data=st.data(), length=st.integers(1, 700), levels=st.sampled_from([1, 3, 50, 10**6]))
def test_what_is_chosen_is_forced_or_among_the_heaviest(data, length: int, levels: int) -> None:
    """Few levels make many equals, any of which may be taken."""
    seed = data.draw(st.integers(0, 2**32))
    budgets = data.draw(
        st.lists(
            st.builds(HeadBudget, st.integers(1, 900), st.integers(1, 900)), min_size=1, max_size=7
        )
    )
    generator = torch.Generator().manual_seed(seed)
    tiles = -(-length // 128)
    columns = torch.randint(levels, (len(budgets), length), generator=generator).float()
    # Of bands only what they touch is seen, so none are equal.
    bands = torch.stack([torch.randperm(tiles, generator=generator) for _ in budgets]).float()
    chosen = sparse.by_bands(Sums(columns, bands, None, None, 64), budgets)
    for head, budget in enumerate(budgets):
        own_columns, distances = chosen.of_head(head)
        check_heaviest(own_columns.tolist(), columns[head], budget.verticals, 30)
        order = [0, *(b for b in bands[head].argsort(descending=True).tolist() if b)]
        touched = {b + more for b in order[: budget.bands] for more in (0, 1)}
        assert distances.tolist() == sorted(b for b in touched if b < tiles)


@pytest.mark.parametrize("length", [20, 100, 129, 1000])
def test_what_is_forced_is_what_small_budgets_choose(length: int) -> None:
    budgets = [HeadBudget(30, 128), HeadBudget(1, 1)]
    assert sparse.leave_no_choice(budgets)
    for larger in (HeadBudget(31, 128), HeadBudget(30, 129)):
        assert not sparse.leave_no_choice([*budgets, larger])
    tiles = -(-length // 128)
    sums = Sums(torch.rand(2, length), torch.rand(2, tiles), None, None, 64)
    expected = sparse.by_bands(sums, budgets)
    chosen = sparse.what_is_forced(budgets, [length] * 2, torch.device("cpu"))
    for head in range(2):
        for actual, wanted in zip(chosen.of_head(head), expected.of_head(head), strict=True):
            assert actual.tolist() == wanted.tolist()


def test_diagonals_are_chosen_as_published() -> None:
    sums = random_sums(3000)
    assert sums.diagonals is not None
    chosen = sparse.by_diagonals(sums, [HeadBudget(40, slashes) for slashes in (1, 120, 300)])
    for head, slashes in enumerate((1, 120, 300)):
        weights = sums.diagonals[head].clone()
        weights[:100] = torch.inf
        heaviest = weights.argsort(descending=True)[: max(slashes, 100)].tolist()
        expected = {d // 128 for d in heaviest} | {-(-d // 128) for d in heaviest}
        _, distances = chosen.of_head(head)
        assert distances.tolist() == sorted(d for d in expected if d < 24)


def test_coverage_takes_as_few_bands_as_cover() -> None:
    bands = torch.tensor([[1.0, 30.0, 2.0, 20.0, 0.5], [60.0, 1.0, 1.0, 1.0, 0.0]])
    columns = torch.zeros(2, 600)
    columns[0, 300] = 8.0
    columns[1, 400] = 0.9
    heavy_columns = columns * (columns >= 1)
    sums = Sums(columns, bands, heavy_columns, None, 64)
    chosen = sparse.by_coverage(sums, heavy=1.0, coverage=0.9)
    assert chosen.of_head(0)[0].tolist() == [*range(30), 300]
    assert chosen.of_head(1)[0].tolist() == list(range(30))
    # 8 of 64 in the column and 1 in the nearest band; 57.6 are wanted, so 30 and 20 are taken.
    assert chosen.of_head(0)[1].tolist() == [0, 1, 2, 3, 4]
    assert chosen.of_head(1)[1].tolist() == [0, 1]


def test_selecting_diagonals_needs_their_sums() -> None:
    sums = random_sums(500)
    with pytest.raises(ValueError, match="single diagonals"):
        sparse.by_diagonals(Sums(sums.columns, sums.bands, None, None, 64), [HeadBudget(1, 1)] * 3)


def test_coverage_needs_to_know_heavy_columns() -> None:
    with pytest.raises(ValueError, match="heavy columns"):
        sparse.by_coverage(random_sums(500), 1.0, 0.9)


def test_lists_that_are_not_contiguous_are_refused() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        Selections(torch.zeros(2, 256, dtype=torch.int32)[:, :128], torch.zeros(2, 1).int())


@given(seed=st.integers(0, 99), keys=st.integers(1, 2_000))
def test_whatever_comes_from_ranks_that_died_may_be_looked_up(seed: int, keys: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    most = 2**31 if seed % 2 else 2 * keys
    columns, distances = (
        torch.randint(-most, most, (3, count), generator=generator).to(torch.int32)
        for count in (256, 9)
    )
    made = Selections.received(columns, distances, keys)
    for places, end in ((made.columns, keys), (made.distances, -(-keys // 128))):
        assert ((places == NOTHING) | ((places >= 0) & (places < end))).all()
    assert (made.distances.diff() >= 0).all()
    assert made.distances[:, 0].tolist() == [0, 0, 0]


def test_what_comes_whole_is_taken_as_it_is() -> None:
    sent = Selections.of([[0, 7, 299], [5]], [[0, 2], [0, 1]])
    made = Selections.received(sent.columns, sent.distances, 300)
    assert made.columns.equal(sent.columns)
    assert made.distances.equal(sent.distances)


def test_more_rows_than_one_product_takes_are_refused() -> None:
    problem = make_small_problem(300, None)
    with pytest.raises(ValueError, match="65 rows"):
        all_sums(triton_sums, problem.last_queries(65), 235, problem.pages, 0, None, SCALE, 2)


def test_from_queries_to_output_both_versions_agree() -> None:
    chunk = (384, 128)
    problem = make_problem(1000, True, 4, 2, 64, torch.float32, chunk)
    rows = QueryBlocks((2, 5, 7), 1000)
    budgets = [HeadBudget(40, 128), HeadBudget(200, 300), HeadBudget(30, 500), HeadBudget(90, 1)]
    sums = all_sums(portable_sums, problem.last_queries(64), 936, problem.pages, 0, 256, SCALE, 2)
    expected, _ = portable.attention(
        problem.queries(rows), rows, problem.pages, 256, SCALE, sparse.by_bands(sums, budgets)
    )
    problem = make_problem(1000, True, 4, 2, 64, torch.float32, chunk, DEVICE)
    sums = all_sums(triton_sums, problem.last_queries(64), 936, problem.pages, 0, 256, SCALE, 2)
    output, _ = triton_attention.attention(
        problem.queries(rows), rows, problem.pages, 256, SCALE, sparse.by_bands(sums, budgets)
    )
    assert relative_error(output, expected) < 5e-3


def test_a_slash_is_no_heavy_column_and_a_column_is() -> None:
    """Each key of a slash is looked at by one row, a column by all."""
    problem = make_problem(1000, dual=False)
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(16), dim=0)
    own = torch.randn(64, 1, 16)
    own -= (own @ common)[..., None] * common
    plant = {936 + row - 700: own[row, 0] * 3 for row in range(64)} | {431: common * 10}
    for token, key in plant.items():
        page, offset = divmod(token, 128)
        problem.pages.memory[int(problem.pages.table.pages[page]), 0, 0, offset] = key
    queries = SegmentQueries(*(own + 4 * common for _ in range(3)))
    sums = sparse.sums(queries, 936, problem.pages, 0, None, SCALE, 2, heavy=2.0)
    assert sums.heavy_columns is not None
    assert sums.heavy_columns[0].nonzero().flatten().tolist() == [431]
    columns, distances = sparse.by_coverage(sums, 2.0, 0.95).of_head(0)
    assert columns.tolist() == [*range(30), 431]
    assert {700 // 128, 700 // 128 + 1} <= set(distances.tolist())


def test_selection_finds_a_planted_column_and_a_planted_diagonal() -> None:
    problem = make_problem(1000, dual=False)
    torch.manual_seed(0)
    common = torch.nn.functional.normalize(torch.randn(16), dim=0)
    own = torch.randn(64, 1, 16)
    rows = own + 4 * common
    plant = {936 + row - 700: own[row, 0] * 3 for row in range(64)} | {431: common * 12}
    for token, key in plant.items():
        page, offset = divmod(token, 128)
        problem.pages.memory[int(problem.pages.table.pages[page]), 0, 0, offset] = key
    queries = SegmentQueries(rows, rows, rows)
    sums = sparse.sums(queries, 936, problem.pages, 0, None, SCALE, 2)
    columns, distances = sparse.by_bands(sums, [HeadBudget(100, 256)]).of_head(0)
    assert 431 in columns
    assert 700 // 128 in distances
