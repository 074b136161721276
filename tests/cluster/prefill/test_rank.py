"""A rank of a gang of one, in this process."""

from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch

from longreach.cluster.messages import WorkerDestination
from longreach.cluster.prefill.rank import Meeting, PrefillRank, RankResult
from longreach.cluster.prefill.scheduler import Chunk
from longreach.engine.errors import ChunkOutOfMemoryError, InvalidRequestError, LeftMeshError
from longreach.engine.kv import background
from longreach.engine.kv.destination import Destination
from longreach.engine.kv.hand_off import HandOff, Place
from longreach.engine.kv.pages import HeldPages
from longreach.engine.messages import Tokens
from longreach.engine.prefill.chunk import ChunkResult
from longreach.kernels import dual_chunk

from ..conftest import CHUNK_TOKENS, gangs_with, make_settings


class NoHandOff(HandOff):
    """Takes pages and does nothing with them."""

    def push(self, place: Place, pages: HeldPages) -> None: ...
    def push_whole(self, place: Place, pages: HeldPages) -> None: ...
    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None: ...
    def flush(self) -> None: ...
    def abandon(self) -> None: ...
    def before_leaving(self) -> None: ...


TO = Destination("anywhere", done=0)


def make_rank() -> PrefillRank:
    settings = make_settings(1)
    prefill = gangs_with(settings, sequence_parallel=1, kv_cache_tokens=2048)
    made = PrefillRank(settings.model_copy(update={"prefill": prefill}).gangs[0])
    made.join(Meeting.of_one(), 0, 1)
    return made


def run_chunk(
    rank: PrefillRank, chunk: Chunk, prompt: Tokens | None, destination: Destination | None
) -> RankResult:
    rank.begin_chunk(chunk, prompt, destination)
    return rank.finish_chunk(chunk)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> PrefillRank:
    monkeypatch.setattr(PrefillRank, "_open", lambda *arguments: NoHandOff())
    return make_rank()


def test_a_chunk_that_needs_too_much_memory_leaves_the_rank_as_it_was(
    rank: PrefillRank, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt = np.full(1500, 65, dtype=np.int32)
    expected = run_chunk(rank, Chunk("whole", 0, 1500, True), prompt, TO).logits
    rank.release("whole")
    kernel = dual_chunk.attention

    def small_kernel(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    run_chunk(rank, Chunk("a", 0, 1024, False), prompt, TO)
    monkeypatch.setattr(dual_chunk, "attention", small_kernel)
    failing = Chunk("a", 1024, 1500, True)
    with pytest.raises(ChunkOutOfMemoryError) as raised:
        rank.begin_chunk(failing, None, None)
    with pytest.raises(ChunkOutOfMemoryError):
        rank.finish_chunk(failing)
    assert (raised.value.start, raised.value.end) == (1024, 1500)
    monkeypatch.setattr(dual_chunk, "attention", kernel)
    after = run_chunk(rank, Chunk("b", 0, 1500, True), prompt, TO).logits
    assert expected is not None
    assert after is not None
    np.testing.assert_array_equal(after, expected)


def test_results_may_be_asked_for_before_their_chunk_is_launched_and_after_the_next(
    rank: PrefillRank,
) -> None:
    """The two calls of a chunk run on different threads, and in no order."""
    prompt = np.full(1500, 65, dtype=np.int32)
    expected = run_chunk(rank, Chunk("whole", 0, 1500, True), prompt, TO).logits
    rank.release("whole")
    first, last = Chunk("a", 0, 1024, False), Chunk("a", 1024, 1500, True)
    with ThreadPoolExecutor(2) as threads:
        results = [threads.submit(rank.finish_chunk, each) for each in (last, first)]
        rank.begin_chunk(first, prompt, TO)
        rank.begin_chunk(last, None, None)
        logits = [result.result(timeout=60).logits for result in results]
    assert logits[1] is None
    assert expected is not None
    assert logits[0] is not None
    np.testing.assert_array_equal(logits[0], expected)


@pytest.mark.parametrize(("seconds", "layers"), [(0.125, 1), (0.115, 2), (0.001, 2)])
def test_the_next_chunk_comes_whole_layers_before_this_one_is_computed(
    rank: PrefillRank, monkeypatch: pytest.MonkeyPatch, seconds: float, layers: int
) -> None:
    """As many as take 30 ms, of the four of five that are computed; half of all at most."""
    prompt, to_go = np.full(1500, 65, dtype=np.int32), list[int]()
    compute = rank._prefiller.run_chunk

    def run(*arguments: Any, layers_to_go: int, **named: Any) -> ChunkResult:
        to_go.append(layers_to_go)
        return compute(*arguments, layers_to_go=layers_to_go, **named)

    monkeypatch.setattr(rank._prefiller, "run_chunk", run)
    monkeypatch.setattr(ChunkResult, "stages", {"linear": seconds})
    run_chunk(rank, Chunk("a", 0, 1024, False), prompt, TO)
    run_chunk(rank, Chunk("a", 1024, 1500, True), None, None)
    assert to_go[1] == layers


def test_a_rank_that_has_left_computes_nothing_until_it_meets_others(rank: PrefillRank) -> None:
    """Also a chunk that was launched before means nothing, and is computed again."""
    prompt = np.full(1500, 65, dtype=np.int32)
    expected = run_chunk(rank, Chunk("whole", 0, 1500, True), prompt, TO).logits
    rank.release("whole")
    run_chunk(rank, Chunk("a", 0, 1024, False), prompt, TO)
    launched = Chunk("a", 1024, 1500, True)
    rank.begin_chunk(launched, None, None)
    rank.leave()
    with pytest.raises(LeftMeshError):
        rank.finish_chunk(launched)
    with pytest.raises(LeftMeshError):
        rank.begin_chunk(Chunk("new", 0, 100, True), prompt, TO)
    with pytest.raises(LeftMeshError):
        rank.share("a", prompt, TO, 1024, takes=False)
    rank.meet(Meeting.of_one(), 0)
    rank.come_back("a", "b", TO, 1024)
    logits = run_chunk(rank, Chunk("b", 1024, 1500, True), None, None).logits
    assert expected is not None
    assert logits is not None
    np.testing.assert_array_equal(logits, expected)


class SlowHandOff(NoHandOff):
    """Fetches when it is let."""

    def __init__(self) -> None:
        self.said: str | None = None
        self.wanted_pages: list[tuple[Place, HeldPages]] = []
        self.fetched: Future[None] = Future()

    @property
    def failure(self) -> str | None:
        return self.said

    def begin_fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> Future[None]:
        self.wanted_pages += wanted
        return self.fetched


def test_chunks_are_computed_beside_a_fetch(monkeypatch: pytest.MonkeyPatch) -> None:
    """And whether ranks part meanwhile means nothing to it."""
    slow, rank = SlowHandOff(), make_rank()
    hand_offs = iter([slow, NoHandOff()])
    monkeypatch.setattr(rank, "_open", lambda destination: next(hand_offs))
    prompt = np.full(1500, 65, dtype=np.int32)
    back = Chunk("a", 0, 1024, False, is_back=True)
    with ThreadPoolExecutor(1) as threads:
        fetched = threads.submit(rank.finish_fetch, back)
        rank.begin_fetch(back, prompt, TO)
        assert {place.first_page for place, _ in slow.wanted_pages} == {0}
        result = run_chunk(rank, Chunk("b", 0, 300, True), prompt[:300], TO)
        assert result.logits is not None
        assert not fetched.done()
        rank.leave()
        rank.meet(Meeting.of_one(), 0)
        slow.said = "they did not come"
        slow.fetched.set_result(None)
        assert fetched.result(timeout=60).failure == "they did not come"
    slow.said = None
    assert run_chunk(rank, Chunk("a", 1024, 1500, True), None, None).logits is not None


def test_no_place_of_a_fetch_is_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever sends or takes one gathers it on its device, and counts with a chunk at most."""
    slow, rank = SlowHandOff(), make_rank()
    monkeypatch.setattr(rank, "_open", lambda destination: slow)
    rank.begin_fetch(
        Chunk("a", 0, 2048 - 128, False, is_back=True), np.full(2048, 65, dtype=np.int32), TO
    )
    pages: dict[int, list[tuple[int, int]]] = {}
    for place, held in slow.wanted_pages:
        pages.setdefault(place.layer, []).append((place.first_page, len(held)))
    assert CHUNK_TOKENS == 1024
    assert list(pages.values()) == [[(0, 8), (8, 7)]] * rank._num_layers


def test_hand_offs_note_what_is_written_before_their_mesh_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hand_off, was_left = NoHandOff(), list[bool]()
    monkeypatch.setattr(PrefillRank, "_open", lambda *arguments: hand_off)
    rank = make_rank()
    monkeypatch.setattr(hand_off, "before_leaving", lambda: was_left.append(rank._mesh.is_left))
    run_chunk(rank, Chunk("a", 0, 100, True), np.full(100, 65, dtype=np.int32), TO)
    rank.leave()
    assert was_left == [False]


def test_pages_may_be_given_to_a_rank_again(rank: PrefillRank) -> None:
    """The first time was given up half-way."""
    prompt = np.full(1500, 65, dtype=np.int32)
    for _ in range(2):
        rank.share("a", prompt, TO, 1024, takes=True)
    assert run_chunk(rank, Chunk("a", 1024, 1500, True), None, None).logits is not None


@pytest.mark.parametrize("takes", [True, False])
def test_pages_that_a_prompt_goes_on_with_are_whole_whatever_becomes_of_the_mesh(
    monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    """Ranks may part before they are sent, as to let another one in."""
    first, second, prompt = Mock(), Mock(), np.full(1500, 65, dtype=np.int32)
    opened, rank = iter([first, second]), make_rank()
    monkeypatch.setattr(rank, "_open", lambda destination: next(opened))
    if takes:
        rank.share("a", prompt, TO, 1024, takes=True)
    else:
        run_chunk(rank, Chunk("a", 0, 1024, False), prompt, TO)
    rank.come_back("a", "b", TO, 1024)
    assert second.push_whole.call_count == rank._num_layers
    second.push.assert_not_called()


@pytest.mark.parametrize(
    "parted", ["before", "as it was given pages", "in its collective", "meanwhile"]
)
def test_a_rank_that_was_not_given_pages_keeps_none(
    rank: PrefillRank, monkeypatch: pytest.MonkeyPatch, parted: str
) -> None:
    """It has just come, and the ranks part before a prompt goes on under another name."""
    free, prompt = rank._prefiller._pool.num_free, np.full(1500, 65, dtype=np.int32)

    def part(*given: Any) -> None:
        raise LeftMeshError

    def end_a_collective(*given: Any) -> None:
        rank.leave()
        raise RuntimeError("it was given up")

    with monkeypatch.context() as patched:
        if parted == "before":
            rank.leave()
        elif parted == "as it was given pages":
            patched.setattr(rank._prefiller, "_share", part)
        elif parted == "in its collective":
            patched.setattr(rank._prefiller, "_share", end_a_collective)
        else:  # On a GPU nobody is told.
            patched.setattr(rank._prefiller, "_share", lambda *given: rank.leave())
        with pytest.raises(LeftMeshError):
            rank.share("a", prompt, TO, 1024, takes=True)
    with pytest.raises(InvalidRequestError):
        rank.come_back("a", "b", TO, 1024)
    assert rank._prefiller._pool.num_free == free
    rank.leave()
    rank.meet(Meeting.of_one(), 0)
    rank.share("b", prompt, TO, 1024, takes=True)
    assert run_chunk(rank, Chunk("b", 1024, 1500, True), None, None).logits is not None


@pytest.mark.parametrize("takes", [True, False])
def test_a_rank_that_cannot_share_leaves_the_others_alone(
    rank: PrefillRank, monkeypatch: pytest.MonkeyPatch, takes: bool
) -> None:
    """They wait for its part, and must not get what its next chunk would have told them."""
    prompt = np.full(1500, 65, dtype=np.int32)
    run_chunk(rank, Chunk("a", 0, 1024, False), prompt, TO)

    def small(*given: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(rank._prefiller, "_share", small)
        with pytest.raises(ChunkOutOfMemoryError) as raised:
            rank.share("a", prompt, TO, 1024, takes)
    assert (raised.value.start, raised.value.end) == (0, 1024)
    with pytest.raises(LeftMeshError):
        rank.begin_chunk(Chunk("a", 1024, 1500, True), None, None)
    rank.meet(Meeting.of_one(), 0)
    rank.release("a")
    assert run_chunk(rank, Chunk("b", 0, 1500, True), prompt, TO).logits is not None


def test_all_requests_of_a_rank_are_handed_off_on_one_stream(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As far as handing off goes, the rank is on a GPU. Each sender's thread sets its stream."""
    made, used = Mock(side_effect=lambda device: Mock(device=device)), list[Any]()
    monkeypatch.setattr(background, "hand_off_stream", made)
    monkeypatch.setattr(torch.cuda, "Event", Mock())
    monkeypatch.setattr(torch.cuda, "current_stream", Mock())
    monkeypatch.setattr(torch.cuda, "set_stream", used.append)
    rank = make_rank()
    monkeypatch.setattr(ray, "put", Mock())
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", Mock())
    prompt = np.full(300, 65, dtype=np.int32)
    for name in ("a", "b", "c"):
        destination = WorkerDestination(name, 0, Mock(), 0)
        assert run_chunk(rank, Chunk(name, 0, 300, True), prompt, destination).failure is None
        assert rank.flush(name) is None
    assert made.call_count == 1
    assert used == [used[0]] * 3
