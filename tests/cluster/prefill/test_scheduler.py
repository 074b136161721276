"""Which prompt is next: orders, pages and waiting, without a cluster."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.cluster.prefill.scheduler import Chunk, ChunkScheduler
from longreach.engine.errors import InvalidRequestError, PromptTooLongError
from longreach.kernels.page_size import PAGE_TOKENS

CHUNK = 1024


def make_scheduler(pages: int = 1000, ageing: float = 100.0) -> ChunkScheduler:
    return ChunkScheduler(CHUNK, pages, ageing)


def compute(scheduler: ChunkScheduler, now: float) -> Chunk:
    chunk = scheduler.next(now)
    assert chunk is not None
    scheduler.computed(chunk, now)
    if chunk.is_last:
        scheduler.remove(chunk.request_id)
    return chunk


def test_a_short_prompt_overtakes_a_long_one_at_a_chunk_boundary() -> None:
    scheduler = make_scheduler()
    scheduler.add("long", 10 * CHUNK, 0.0)
    assert compute(scheduler, 0.0) == Chunk("long", 0, CHUNK, False)
    scheduler.add("short", 100, 0.0)
    assert compute(scheduler, 0.0) == Chunk("short", 0, 100, True)
    assert compute(scheduler, 0.0) == Chunk("long", CHUNK, 2 * CHUNK, False)


def test_a_long_prompt_gets_a_chunk_after_its_remaining_tokens_over_ageing() -> None:
    scheduler = make_scheduler(ageing=1024.0)
    scheduler.add("long", 10 * CHUNK, 0.0)
    now, served = 0.0, []
    while len(served) < 3:
        scheduler.add(f"short {now}", CHUNK, now)
        chunk = compute(scheduler, now)
        served += [now] if chunk.request_id == "long" else []
        now += 1.0
    assert served[0] <= 10.0
    assert served[1] - served[0] <= 10.0


def test_a_prompt_that_waits_for_pages_lets_shorter_ones_pass_until_its_turn_comes() -> None:
    scheduler = make_scheduler(pages=20, ageing=1.0)
    scheduler.add("first", 15 * PAGE_TOKENS, 0.0)
    assert compute(scheduler, 0.0).request_id == "first"
    scheduler.add("big", 18 * PAGE_TOKENS, 0.0)
    scheduler.add("small", 2 * PAGE_TOKENS, 0.0)
    assert compute(scheduler, 0.0).request_id == "small"
    # By now its age weighs more than its length: nobody may take the pages it waits for.
    later = 100.0 * CHUNK
    scheduler.add("another", 2 * PAGE_TOKENS, later)
    assert compute(scheduler, later).request_id == "first"
    assert compute(scheduler, later).request_id == "big"


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(pages=4)
    with pytest.raises(PromptTooLongError, match="shorten"):
        scheduler.add("a", 4 * PAGE_TOKENS + 1, 0.0)
    scheduler.add("a", 4 * PAGE_TOKENS, 0.0)
    with pytest.raises(InvalidRequestError):
        scheduler.add("a", 1, 0.0)


@given(
    prompts=st.lists(
        st.tuples(st.integers(1, 12 * CHUNK), st.floats(0, 50), st.booleans()), max_size=20
    ),
    ageing=st.floats(1, 1e5),
)
def test_every_prompt_is_computed_once_in_order_and_all_pages_come_back(
    prompts: list[tuple[int, float, bool]], ageing: float
) -> None:
    scheduler = make_scheduler(pages=120, ageing=ageing)
    done: dict[str, int] = {}
    expected: dict[str, int] = {}
    pending = sorted(
        (arrives, str(index), tokens, cancelled)
        for index, (tokens, arrives, cancelled) in enumerate(prompts)
    )
    now = 0.0
    while pending or scheduler.num_running or scheduler.num_waiting:
        while pending and pending[0][0] <= now:
            _, name, tokens, cancelled = pending.pop(0)
            scheduler.add(name, tokens, now)
            if cancelled:
                scheduler.remove(name)
            else:
                expected[name] = tokens
        now += 1.0
        chunk = scheduler.next(now)
        assert 0 <= scheduler.usage <= 1
        if chunk is None:
            assert not scheduler.num_running
            continue
        assert chunk.start == done.get(chunk.request_id, 0)
        assert chunk.start % PAGE_TOKENS == 0
        done[chunk.request_id] = chunk.end
        scheduler.computed(chunk, now)
        if chunk.is_last:
            scheduler.remove(chunk.request_id)
    assert done == expected
    assert scheduler.usage == 0
