"""Which prompt is next: chunks, orders and pages, without a cluster."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longreach.cluster.prefill.scheduler import Chunk, ChunkScheduler
from longreach.engine.errors import CacheTooSmallError, InvalidRequestError
from longreach.engine.fairness import Turns
from longreach.kernels.page_size import PAGE_TOKENS

CHUNK = 1024
PAGES = 120


def make_scheduler(pages: int = 1000, patience: float = 2.0) -> ChunkScheduler:
    return ChunkScheduler(CHUNK, pages, patience)


def pages_of(tokens: int) -> int:
    return -(-tokens // PAGE_TOKENS)


def compute(scheduler: ChunkScheduler) -> Chunk:
    chunk = scheduler.next()
    assert chunk is not None
    if chunk.is_back:
        scheduler.ended(chunk, is_computed=True)
    if chunk.is_last:
        scheduler.remove(chunk.request_id)
    return chunk


def test_a_short_prompt_overtakes_a_long_one_at_a_chunk_border() -> None:
    scheduler = make_scheduler()
    scheduler.add("long", 10 * CHUNK)
    assert compute(scheduler) == Chunk("long", 0, CHUNK, False)
    scheduler.add("short", 100)
    assert compute(scheduler) == Chunk("short", 0, 100, True)
    assert compute(scheduler) == Chunk("long", CHUNK, 2 * CHUNK, False)


def test_tokens_to_go_are_those_that_no_chunk_was_dealt_for() -> None:
    scheduler = make_scheduler()
    scheduler.add("long", 3 * CHUNK)
    scheduler.add("short", 100)
    assert scheduler.tokens_to_go == 3 * CHUNK + 100
    compute(scheduler)
    assert scheduler.tokens_to_go == 3 * CHUNK
    compute(scheduler)
    scheduler.remove("long")
    assert scheduler.tokens_to_go == 0


def test_equal_long_prompts_run_one_after_the_other() -> None:
    scheduler = make_scheduler()
    scheduler.add("first", 8 * CHUNK)
    scheduler.add("second", 8 * CHUNK)
    computed = [compute(scheduler).request_id for _ in range(16)]
    assert computed == ["first"] * 8 + ["second"] * 8


def test_a_short_prompt_among_four_long_ones_waits_for_one_chunk() -> None:
    scheduler = make_scheduler()
    for name in "abcd":
        scheduler.add(name, 32 * CHUNK)
    assert compute(scheduler).request_id == "a"
    scheduler.add("short", 1000)
    assert compute(scheduler).request_id == "short"


def test_a_chunk_counts_as_passing_even_if_its_prompt_is_cancelled_meanwhile() -> None:
    scheduler = make_scheduler(patience=1.0)
    scheduler.add("long", 10 * CHUNK)
    computed = []
    for turn in range(11):
        scheduler.add(f"cancelled {turn}", 2 * CHUNK)
        chunk = scheduler.next()
        assert chunk is not None
        computed.append(chunk.request_id)
        scheduler.remove(f"cancelled {turn}")
    assert computed == [f"cancelled {turn}" for turn in range(10)] + ["long"]


def test_nobody_gets_pages_before_the_prompt_whose_turn_it_is() -> None:
    scheduler = make_scheduler(pages=20, patience=1.0)
    scheduler.add("big", 18 * PAGE_TOKENS)
    scheduler.add("shorter", 15 * PAGE_TOKENS)
    assert compute(scheduler) == Chunk("shorter", 0, CHUNK, False)
    for turn in range(5):
        scheduler.add(f"small {turn}", 2 * PAGE_TOKENS)
        assert compute(scheduler).request_id == f"small {turn}"
    # By now "big" has been passed by as many tokens as it has: nobody may have pages before it.
    scheduler.add("another", 2 * PAGE_TOKENS)
    assert compute(scheduler) == Chunk("shorter", CHUNK, 15 * PAGE_TOKENS, True)
    assert compute(scheduler) == Chunk("big", 0, CHUNK, False)
    assert compute(scheduler).request_id == "another"


def test_what_can_never_fit_is_refused() -> None:
    scheduler = make_scheduler(pages=4)
    with pytest.raises(CacheTooSmallError) as refused:
        scheduler.add("a", 4 * PAGE_TOKENS + 1)
    assert vars(refused.value) == {
        "phase": "prefill", "needed": 4 * PAGE_TOKENS + 1, "total": 4 * PAGE_TOKENS
    }  # fmt: skip
    scheduler.add("a", 4 * PAGE_TOKENS)
    with pytest.raises(InvalidRequestError):
        scheduler.add("a", 1)
    assert scheduler.num_waiting == 1


def test_whole_chunks_that_were_computed_before_come_back() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", 3 * CHUNK, done=2 * CHUNK + 5 * PAGE_TOKENS)
    assert scheduler.tokens_to_go == CHUNK
    assert compute(scheduler) == Chunk("a", 0, 2 * CHUNK, False, is_back=True)
    assert scheduler.tokens_to_go == CHUNK
    assert compute(scheduler) == Chunk("a", 2 * CHUNK, 3 * CHUNK, True)


@pytest.mark.parametrize(
    ("chunk_tokens", "ends"),
    [
        (CHUNK, [131_072, 262_144, 299_008]),
        (50_048, [100_096, 200_192, 250_240]),
        (200_064, [200_064]),
    ],
)
def test_a_long_prompt_comes_back_a_part_at_a_time(chunk_tokens: int, ends: list[int]) -> None:
    """In whole chunks, so that the others begin where they would have."""
    scheduler = ChunkScheduler(chunk_tokens, 10_000, 2.0)
    scheduler.add("a", 400_000, done=300_000)
    for start, end in itertools.pairwise([0, *ends]):
        assert compute(scheduler) == Chunk("a", start, end, False, is_back=True)
    assert compute(scheduler).start == ends[-1]


def test_a_prompt_whose_pages_are_on_their_way_back_has_no_turn() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", 3 * CHUNK, done=2 * CHUNK)
    back = scheduler.next()
    assert back is not None
    assert back == Chunk("a", 0, 2 * CHUNK, False, is_back=True)
    assert scheduler.is_fetching("a")
    assert scheduler.next() is None
    scheduler.add("b", 3 * CHUNK)
    assert [compute(scheduler).request_id for _ in range(3)] == ["b"] * 3
    assert scheduler.next() is None
    scheduler.ended(back, is_computed=False)
    assert not scheduler.is_fetching("a")
    assert compute(scheduler) == back


def test_pages_that_are_being_fetched_into_are_nobody_elses() -> None:
    scheduler = make_scheduler(pages=2 * pages_of(CHUNK))
    scheduler.add("a", CHUNK + PAGE_TOKENS, done=CHUNK)
    back = scheduler.next()
    assert back is not None
    scheduler.leave("a")
    assert scheduler.is_fetching("a")
    assert scheduler.usage == pytest.approx(pages_of(CHUNK + PAGE_TOKENS) / (2 * pages_of(CHUNK)))
    scheduler.add("b", CHUNK)
    assert scheduler.next() is None
    scheduler.ended(back, is_computed=True)
    assert scheduler.usage == 0
    assert compute(scheduler).request_id == "b"
    assert scheduler.taken() == ["a"]


def test_of_pages_that_were_left_those_go_first_that_nothing_is_fetched_into() -> None:
    scheduler = make_scheduler(pages=2 * pages_of(CHUNK + 1))
    scheduler.add("fetched into", CHUNK + 1, done=CHUNK)
    assert scheduler.next() is not None
    scheduler.leave("fetched into")
    scheduler.add("left", CHUNK + 1)
    compute(scheduler)
    scheduler.leave("left")
    scheduler.add("new", CHUNK + 1)
    assert compute(scheduler).request_id == "new"
    assert scheduler.taken() == ["left"]


@pytest.mark.parametrize(("tokens", "computed"), [(2 * CHUNK, CHUNK), (2 * CHUNK + 1, 1)])
def test_the_last_chunk_never_comes_back_as_the_logits_do_not(tokens: int, computed: int) -> None:
    scheduler = make_scheduler()
    scheduler.add("a", tokens, done=tokens + PAGE_TOKENS - 1)
    chunks = [compute(scheduler), compute(scheduler)]
    assert chunks[-1].is_last
    assert sum(chunk.computed_tokens for chunk in chunks) == computed


def test_nothing_of_a_prompt_that_is_scored_comes_back() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", 2 * CHUNK, score_top=1, done=CHUNK)
    assert not compute(scheduler).is_back


def test_pages_that_were_left_are_free_and_lie_until_somebody_needs_them() -> None:
    scheduler = make_scheduler(pages=3 * pages_of(CHUNK))
    for name in "ab":
        scheduler.add(name, CHUNK + 1)
        compute(scheduler)
        scheduler.leave(name)
    # One page more each than a chunk: two prompts, and a part of a third one's.
    assert scheduler.usage == 0
    assert scheduler.num_running == scheduler.num_waiting == 0
    assert scheduler.next() is None
    assert (scheduler.left_behind("a"), scheduler.left_behind("b")) == (CHUNK, CHUNK)
    scheduler.add("small", 128)
    compute(scheduler)
    assert scheduler.taken() == []
    scheduler.add("large", CHUNK)
    assert compute(scheduler).request_id == "large"
    assert scheduler.taken() == ["a"]
    assert scheduler.taken() == []
    assert (scheduler.left_behind("a"), scheduler.left_behind("b")) == (0, CHUNK)
    assert scheduler.come_back("b", "b again") == CHUNK
    assert scheduler.usage == pytest.approx(pages_of(CHUNK + 1) / (3 * pages_of(CHUNK)))
    assert compute(scheduler) == Chunk("b again", CHUNK, CHUNK + 1, True)
    assert scheduler.usage == 0


def test_a_prompt_that_was_left_in_mid_prompt_is_passed_by_what_it_has_to_go() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", 5 * CHUNK)
    compute(scheduler)
    compute(scheduler)
    scheduler.leave("a")
    assert scheduler.come_back("a", "b") == 2 * CHUNK
    assert scheduler.tokens_to_go == 3 * CHUNK
    scheduler.add("c", 4 * CHUNK)
    assert [compute(scheduler).request_id for _ in range(4)] == ["b", "b", "b", "c"]


def test_a_prompt_goes_on_before_the_first_of_its_chunks_that_failed() -> None:
    """Two are under way at a time, and both fail with a rank."""
    scheduler = make_scheduler()
    scheduler.add("a", 5 * CHUNK)
    first, second, third = (compute(scheduler) for _ in range(3))
    scheduler.ended(first, is_computed=True)
    scheduler.leave("a")
    scheduler.ended(second, is_computed=False)
    scheduler.ended(third, is_computed=False)
    assert scheduler.left_behind("a") == CHUNK
    assert scheduler.come_back("a", "b") == CHUNK
    assert compute(scheduler) == Chunk("b", CHUNK, 2 * CHUNK, False)


def test_a_chunk_may_fail_when_its_prompt_has_another_name_already() -> None:
    scheduler = make_scheduler()
    scheduler.add("a", 5 * CHUNK)
    first, second = compute(scheduler), compute(scheduler)
    scheduler.leave("a")
    assert scheduler.come_back("a", "b") == 2 * CHUNK
    third = compute(scheduler)
    scheduler.leave("b")
    scheduler.ended(first, is_computed=True)
    scheduler.ended(second, is_computed=False)
    scheduler.ended(third, is_computed=False)
    assert scheduler.left_behind("b") == CHUNK


def test_what_waited_for_pages_leaves_none() -> None:
    scheduler = make_scheduler(pages=8)
    for name in "ab":
        scheduler.add(name, CHUNK)
    scheduler.next()
    scheduler.leave("b")
    assert scheduler.left_behind("b") == 0
    scheduler.remove("a")
    assert scheduler.usage == 0


class Ledger:
    """What a test knows of a scheduler by its own counting."""

    def __init__(self, patience: float) -> None:
        self.scheduler = make_scheduler(PAGES, patience)
        self.turns = Turns(patience)
        self.tokens: dict[str, int] = {}
        self.done: dict[str, int] = {}
        self.holders: set[str] = set()

    def add(self, name: str, tokens: int) -> None:
        self.scheduler.add(name, tokens)
        self.turns.join(name, tokens)
        self.tokens[name] = tokens

    def remove(self, name: str) -> None:
        self.scheduler.remove(name)
        self.turns.leave(name)
        self.holders.discard(name)

    def compute(self) -> bool:
        """Compute a chunk, if there is one, and check that it is the right one."""
        order = self.turns.order()
        chunk = self.scheduler.next()
        if chunk is None:
            assert not order
            return False
        name, tokens = chunk.request_id, self.tokens[chunk.request_id]
        assert chunk.start == self.done.get(name, 0)
        assert chunk.end == min(chunk.start + CHUNK, tokens)
        assert chunk.is_last == (chunk.end == tokens)
        if name == order[0]:
            self.holders.add(name)
        else:
            # Nobody was admitted, and whose turn it is would not fit.
            assert name == next(each for each in order if each in self.holders)
            assert self.held + pages_of(self.tokens[order[0]]) > PAGES
        self.done[name] = chunk.end
        self.turns.serve(name, chunk.end - chunk.start)
        if chunk.is_last:
            self.remove(name)
        return True

    @property
    def held(self) -> int:
        return sum(pages_of(self.tokens[name]) for name in self.holders)

    def check_pages(self) -> None:
        assert self.held <= PAGES
        assert self.scheduler.usage == pytest.approx(self.held / PAGES)
        assert self.scheduler.num_running == len(self.holders)


@given(
    turns=st.lists(
        st.tuples(
            st.lists(st.integers(1, PAGES * PAGE_TOKENS) | st.integers(1, CHUNK), max_size=3),
            st.none() | st.integers(0, 20),
        ),
        max_size=40,
    ),
    patience=st.sampled_from([0.1, 1.0, 1e9]),
)
def test_every_prompt_is_computed_once_and_in_turn_within_the_pages_and_all_come_back(
    turns: list[tuple[list[int], int | None]], patience: float
) -> None:
    ledger = Ledger(patience)
    names = (str(number) for number in range(1000))
    cancelled = set()
    for joining, leaving in turns:
        for tokens in joining:
            ledger.add(next(names), tokens)
        if leaving is not None:
            # Cancelled, finished before, or never there: pages come back once or not at all.
            cancelled.add(str(leaving))
            ledger.remove(str(leaving))
        ledger.compute()
        ledger.check_pages()
    while ledger.compute():
        ledger.check_pages()
    assert ledger.scheduler.usage == 0
    assert ledger.scheduler.num_running == ledger.scheduler.num_waiting == 0
    finished = {name for name, done in ledger.done.items() if done == ledger.tokens[name]}
    assert finished >= ledger.tokens.keys() - cancelled
