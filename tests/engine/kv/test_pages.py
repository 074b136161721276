"""Pages: whatever is taken, shared and given back, in any order, adds up."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from longreach.engine.errors import OutOfPagesError, PageFormatError, TransferError
from longreach.engine.kv.arrivals import Arrivals
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import PageGeometry, PagePool, Pages, page_index
from longreach.kernels.page_size import pages_for

GEOMETRY = PageGeometry(num_layers=2, num_kv_heads=1, head_dim=4, dtype=torch.float32)
PAGES = 24


def make_pool() -> PagePool:
    return PagePool(GEOMETRY, PAGES, torch.device("cpu"))


@given(
    st.lists(st.tuples(st.sampled_from(["take", "share", "give"]), st.integers(0, 30)), max_size=60)
)
def test_pages_are_never_held_twice_and_never_lost(steps: list[tuple[str, int]]) -> None:
    pool = make_pool()
    holdings: list[list[int]] = []
    for action, number in steps:
        held = {page for pages in holdings for page in pages}
        assert pool.num_free == PAGES - len(held)
        if action == "take":
            if number > pool.num_free:
                with pytest.raises(OutOfPagesError):
                    pool.allocate(number)
                continue
            pages = pool.allocate(number)
            assert len(set(pages)) == number
            assert not held & set(pages)
            holdings.append(pages)
        elif holdings and action == "share":
            pages = holdings[number % len(holdings)]
            pool.share(pages)
            holdings.append(list(pages))
        elif holdings:
            pool.release(holdings.pop(number % len(holdings)))
    for pages in holdings:
        pool.release(pages)
    assert pool.num_free == PAGES


def test_neighbours_are_given_where_they_are_to_be_had() -> None:
    pool = make_pool()
    first, middle, last = pool.allocate(8), pool.allocate(4), pool.allocate(12)
    assert are_neighbours(first)
    pool.release(first)
    pool.release(last)
    assert pool.allocate(8) == first  # the hole that fits, not the larger one
    assert are_neighbours(pool.allocate(12))
    pool.release(middle)
    assert pool.allocate(4) == middle


def are_neighbours(pages: list[int]) -> bool:
    return pages == list(range(pages[0], pages[0] + len(pages)))


def test_what_nobody_holds_can_be_neither_shared_nor_released() -> None:
    pool = make_pool()
    [page] = pool.allocate(1)
    pool.share([page])
    pool.release([page])
    assert pool.num_free == PAGES - 1
    pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.release([page])
    with pytest.raises(ValueError, match=f"page {page} "):
        pool.share([page])


def test_all_pages_are_shared_or_none() -> None:
    pool = make_pool()
    held = pool.allocate(2)
    free = next(page for page in range(PAGES) if page not in held)
    with pytest.raises(ValueError, match=f"page {free} "):
        pool.share([held[0], free, held[1]])
    pool.release(held)
    assert pool.num_free == PAGES


def test_a_copy_is_in_every_layer() -> None:
    pool = make_pool()
    pool.memory.fill_(torch.nan)
    source, target = pool.allocate(2)
    pool.memory[:, source] = torch.arange(pool.memory[:, source].numel()).view_as(
        pool.memory[:, source]
    )
    pool.copy_page(source, target)
    assert torch.equal(pool.memory[:, target], pool.memory[:, source])


@given(st.integers(0, 10**7))
def test_pages_hold_their_tokens_with_less_than_one_to_spare(tokens: int) -> None:
    assert 0 <= pages_for(tokens) * 128 - tokens < 128


def test_bytes_of_a_page() -> None:
    assert GEOMETRY.bytes_per_page == make_pool().memory[:, 0].numel() * 4
    pool = make_narrow_pool()
    assert pool.scales is not None
    scales = pool.scales[:, 0].numel() * pool.scales.element_size()
    assert pool.geometry.bytes_per_page == pool.memory[:, 0].numel() + scales


def make_narrow_pool() -> PagePool:
    pool = PagePool(GEOMETRY.kept_as("fp8_e4m3"), 6, torch.device("cpu"))
    pool.memory.fill_(torch.nan)
    return pool


def random_pages(count: int) -> Pages:
    values = torch.randn(count, 1, 2, 128, 4).to(torch.float8_e4m3fn)
    return Pages(values, torch.rand(count, 1, 2))


def test_pages_of_8_bits_are_put_and_copied_with_their_scales() -> None:
    pool = make_narrow_pool()
    pages = random_pages(2)
    for layer in range(2):
        pool.put(layer, torch.tensor([4, 1]), 0, pages)
    pool.copy_page(4, 3)
    for layer in range(2):
        there = pool.layer(layer).at(torch.tensor([4, 1, 3]))
        assert torch.equal(there.values.float(), pages.values.float()[[0, 1, 0]])
        assert there.scales is not None
        assert pages.scales is not None
        assert torch.equal(there.scales, pages.scales[[0, 1, 0]])
    assert pool.memory[:, [0, 2, 5]].isnan().all()


@pytest.mark.parametrize("narrow", [True, False])
def test_pages_of_another_format_are_refused(narrow: bool) -> None:
    pool = make_narrow_pool() if narrow else make_pool()
    pages = random_pages(1)
    wide = Pages(pages.values.float())
    with pytest.raises(PageFormatError) as refused:
        pool.put(0, torch.tensor([0]), 0, wide if narrow else pages)
    names = ("float32", "float8_e4m3fn")
    assert (refused.value.came, refused.value.kept) == (names if narrow else names[::-1])


@pytest.mark.parametrize("numbers", [[3, 4, 5], [5, 2, 4], [1], []])
def test_pages_are_picked_by_number_and_as_a_view_where_they_are_neighbours(
    numbers: list[int],
) -> None:
    pool = make_pool()
    pool.memory.copy_(torch.arange(PAGES).view(-1, 1, 1, 1, 1).expand_as(pool.memory))
    index = page_index(np.array(numbers, dtype=np.int64), torch.device("cpu"))
    picked = pool.layer(1).at(index)
    assert picked.values[:, 0, 0, 0, 0].tolist() == numbers
    shares = picked.values.untyped_storage().data_ptr() == pool.memory.untyped_storage().data_ptr()
    assert shares == (numbers != [5, 2, 4])


@pytest.mark.parametrize("numbers", [[3, 4, 5], [7, 0, 3]], ids=["neighbours", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_what_is_written_into_held_pages_is_read_there_and_nowhere_else(
    dtype: torch.dtype, numbers: list[int]
) -> None:
    """Also where only some of a pool's heads are meant."""
    pool = PagePool(PageGeometry(2, 5, 4, dtype), 9, torch.device("cpu"))
    pool.clear()
    every = pool.held(1, np.array(numbers))
    held = replace(every, layer=every.layer.heads(2, 2))
    scales = torch.rand(3, 2, 2) if pool.scales is not None else None
    pages = Pages(torch.randn(3, 2, 2, 128, 4).to(dtype), scales)
    held.write(pages)
    found = held.read()
    assert torch.equal(found.bits, pages.bits)
    if scales is not None:
        assert found.scales is not None
        assert torch.equal(found.scales, scales)
    rest = Pages(pool.memory).bits.clone()
    rest[1, numbers, 2:4] = 0
    assert not rest.any()


def test_held_pages_take_no_others_than_fit() -> None:
    pool = make_pool()
    held = pool.held(0, np.array([1, 2]))
    with pytest.raises(PageFormatError):
        held.write(Pages(torch.zeros(2, 1, 2, 128, 4, dtype=torch.bfloat16)))
    for count, heads in ((3, 1), (2, 2)):
        with pytest.raises(TransferError):
            held.write(Pages(torch.zeros(count, heads, 2, 128, 4)))


@given(st.permutations(range(2 * 3 * 2)), st.integers(0, 12))
def test_tokens_are_complete_up_to_the_first_page_that_lacks_anything(
    order: list[int], count: int
) -> None:
    arrivals = Arrivals(PageGeometry(2, 2, 4, torch.float32), 3)
    there = {(each // 6, each // 2 % 3, each % 2) for each in order[:count]}
    for layer, page, head in there:
        arrivals.note(Place(layer, page, head), 1, 1)
    whole = [all((n, page, h) in there for n in (0, 1) for h in (0, 1)) for page in range(3)]
    assert arrivals.complete_tokens == 128 * (whole.index(False) if False in whole else 3)
