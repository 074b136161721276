"""Pages that are read out of another process by NIXL: all of them, in time, and no others.

Over TCP, where a read needs the peer's process; in shared memory a reader needs nobody.
"""

import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from longreach.cluster.decode import worker as worker_module
from longreach.cluster.transports import nixl
from longreach.cluster.transports.announced import AnnouncedRun
from longreach.cluster.transports.nixl import NixlAgent
from longreach.engine.decode.decoder import Decoder
from longreach.engine.errors import LostError, NoNixlError, PageFormatError, TransferError
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import PagePool, Pages

from .nixl_owner import LAYERS, OWN_HEADS, SECONDS, Case, Owner
from .pair import Pair, make_prompt, replace_ray, settings_of

HEADS, FIRST_HEAD = 5, 2


@pytest.fixture(autouse=True)
def tcp(monkeypatch: pytest.MonkeyPatch) -> None:
    """As between two hosts without other hardware."""
    monkeypatch.setenv("UCX_TLS", "tcp")


def test_a_rank_reads_its_heads_of_a_pool_that_has_more() -> None:
    """As it does of decode's pages; within one process, which reads by the same way."""
    case = Case(torch.float8_e4m3fn)
    theirs, pool = case.make_pool(HEADS), case.make_pool(OWN_HEADS)
    case.fill(theirs)
    numbers, ours = np.array([9, 3, 4]), np.array([0, 1, 7])
    run = AnnouncedRun(Place(1, 0, FIRST_HEAD), numbers, range(FIRST_HEAD, FIRST_HEAD + OWN_HEADS))
    owner = NixlAgent(theirs)  # for as long as it is read from
    size = NixlAgent(pool).read(owner.pool, [(run, pool.held(1, ours))])
    expected = theirs.held(1, numbers).read().heads(FIRST_HEAD, OWN_HEADS)
    found = pool.held(1, ours).read()
    assert size == found.nbytes
    assert torch.equal(found.bits, expected.bits)
    assert found.scales is not None
    assert expected.scales is not None
    assert torch.equal(found.scales, expected.scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_a_ranks_heads_come_to_their_place_and_nothing_else_changes(dtype: torch.dtype) -> None:
    """The reader has more heads than the owner, as decode has more than a tensor rank."""
    case = Case(dtype)
    expected = case.make_pool(OWN_HEADS)
    case.fill(expected)
    owner, pool = Owner(case), case.make_pool(HEADS, extra=5)
    try:
        agent = NixlAgent(pool)
        theirs = np.array([3, 4, 5, 0, 11, 7])
        ours = np.array([2, 3, 4, 9, 16, 0])
        runs = []
        for layer in range(LAYERS):
            every = pool.held(layer, ours)
            held = replace(every, layer=every.layer.heads(FIRST_HEAD, OWN_HEADS))
            runs.append((AnnouncedRun(Place(layer, 0, FIRST_HEAD), theirs), held))
        size = agent.read(owner.pool, runs)
    finally:
        owner.end()
    assert size == sum(held.read().nbytes for _, held in runs)
    own_heads = slice(FIRST_HEAD, FIRST_HEAD + OWN_HEADS)
    for layer in range(LAYERS):
        there = Pages(pool.memory[layer][ours][:, own_heads])
        assert torch.equal(there.bits, Pages(expected.memory[layer][theirs]).bits)
        if pool.scales is not None and expected.scales is not None:
            scales = pool.scales[layer][ours][:, own_heads]
            assert torch.equal(scales, expected.scales[layer][theirs])
    untouched = pool.memory.view(torch.uint8).clone()
    untouched[:, ours, own_heads] = 0
    assert not untouched.any()


def test_neighbours_are_read_in_one_piece_and_not_too_much_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nixl, "_AT_ONCE_BYTES", 40)
    addresses = np.array([100, 110, 120, 130, 140, 200, 210], dtype=np.uint64)
    others = np.array([0, 10, 20, 30, 40, 50, 70], dtype=np.uint64)
    pieces = nixl._Pieces.of(addresses, others, 10)
    found = np.stack((pieces.theirs, pieces.own, pieces.lengths), axis=1).tolist()
    assert found == [[100, 0, 40], [140, 40, 10], [200, 50, 10], [210, 70, 10]]
    some = [pieces.lengths[each].tolist() for each in pieces.some_at_a_time()]
    assert some == [[40], [10, 10, 10]]


def seconds_by_thread() -> dict[int, float]:
    """Of a processor, that each thread of this process has had."""
    return {each.id: each.user_time + each.system_time for each in psutil.Process().threads()}


def test_an_agent_that_nobody_reads_from_leaves_the_processor_alone() -> None:
    """NIXL's own thread never sleeps as NIXL sets it up, and takes a core from whoever computes."""
    pool = Case(torch.float32).make_pool(OWN_HEADS)
    others = seconds_by_thread()
    agent = NixlAgent(pool)
    # Of its threads alone: what tests before this one have left may still be busy.
    own = {
        number: seconds for number, seconds in seconds_by_thread().items() if number not in others
    }
    time.sleep(1)
    now = seconds_by_thread()
    assert own
    assert sum(now[number] - seconds for number, seconds in own.items()) < 0.5
    assert agent.pool.agent


def test_pages_of_another_format_are_refused() -> None:
    """Their bytes would fit, twice as many of them."""
    pool, wide = Case(torch.bfloat16).make_pool(1), Case(torch.float32).make_pool(1)
    agent, other = NixlAgent(pool), NixlAgent(wide)
    first = np.array([0])
    with pytest.raises(PageFormatError):
        agent.read(other.pool, [(AnnouncedRun(Place(0, 0, 0), first), pool.held(0, first))])


LARGE = Case(torch.bfloat16, pages=600, head_dim=128)
"""So much that something can happen while it is read."""


@pytest.fixture
def owner() -> Iterator[Owner]:
    made = Owner(LARGE)
    yield made
    made.end()


def begin_to_read(
    agent: NixlAgent, owner: Owner, pool: PagePool, threads: ThreadPoolExecutor
) -> "Future[int]":
    """A read of everything that the owner has, when its first bytes have come."""
    numbers = np.arange(LARGE.pages)
    whole = [
        (AnnouncedRun(Place(layer, 0, 0), numbers), pool.held(layer, numbers))
        for layer in range(LAYERS)
    ]
    reading = threads.submit(agent.read, owner.pool, whole)
    deadline = time.monotonic() + SECONDS
    while not pool.memory[0, 0].any():
        assert time.monotonic() < deadline
        time.sleep(0)
    return reading


def test_the_death_of_a_peer_is_an_error_within_seconds(owner: Owner) -> None:
    pool = LARGE.make_pool(OWN_HEADS)
    agent = NixlAgent(pool)
    with ThreadPoolExecutor(1) as threads:
        reading = begin_to_read(agent, owner, pool, threads)
        owner.signal(signal.SIGKILL)
        died = time.monotonic()
        with pytest.raises(TransferError):
            reading.result(SECONDS)
        assert time.monotonic() - died < 10
    # And others are read.
    another = Owner(Case(torch.bfloat16, pages=4, head_dim=128))
    try:
        small = AnnouncedRun(Place(0, 0, 0), np.array([1]))
        assert agent.read(another.pool, [(small, pool.held(0, np.array([1])))])
    finally:
        another.end()


def test_a_read_that_hangs_ends_with_its_peer_and_never_writes_later(owner: Owner) -> None:
    """A peer that goes on sends what it had begun to send, and NIXL cannot prevent it."""
    pool = LARGE.make_pool(OWN_HEADS)
    agent = NixlAgent(pool)
    with ThreadPoolExecutor(1) as threads:
        reading = begin_to_read(agent, owner, pool, threads)
        owner.signal(signal.SIGSTOP)
        time.sleep(1)
        assert not reading.done(), "whoever waits for it would give the pages to somebody else"
        owner.signal(signal.SIGCONT)
        assert reading.result(SECONDS) > 0
    pool.memory.zero_()
    time.sleep(0.5)
    assert not pool.memory.any()


@pytest.fixture
def pair(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    replace_ray(monkeypatch)
    made = Pair(settings_of("nixl", "auto"), tmp_path)
    yield made
    made.end()


@pytest.mark.parametrize("then", [signal.SIGCONT, signal.SIGKILL], ids=["goes on", "dies"])
def test_a_rank_that_hangs_holds_its_own_pages_and_nobody_else(
    pair: Pair, then: signal.Signals
) -> None:
    """Its request is over, and its pages are nobody else's until it has done with them."""
    engine = pair.worker._engine
    assert isinstance(engine, Decoder)
    geometry, prompt = engine.pool.geometry, make_prompt(300)
    rank = Owner(Case(geometry.dtype, 3, geometry.head_dim), geometry.num_kv_heads)
    try:
        pair.reserve("a", prompt)
        held = engine.block_table("a")
        rank.signal(signal.SIGSTOP)
        runs = [AnnouncedRun(Place(0, 0, 0), np.arange(3))]
        delivering = pair.loop.submit(pair.worker.deliver("a", 0, (rank.pool, runs)))
        releasing = pair.loop.submit(pair.worker.release("a"))
        pair.reserve("b", prompt)
        logits, failure = pair.prefill("b", prompt)
        assert failure is None
        assert logits is not None
        assert len(pair.answer("b", logits)) == 2
        pair.loop.run(pair.worker.release("b"))
        assert not delivering.done()
        assert not releasing.done()
        assert engine.usage > 0
        rank.signal(then)
        releasing.result(SECONDS)
        assert engine.usage == 0
        engine.pool.memory[:, held] = 0
        if then is signal.SIGKILL:
            with pytest.raises(TransferError):
                delivering.result(SECONDS)
        else:
            delivering.result(SECONDS)
        time.sleep(0.5)
        assert not engine.pool.memory[:, held].any()
    finally:
        rank.end()


@pytest.mark.parametrize("waits", [True, False])
def test_a_gang_is_given_up_when_nothing_of_it_is_under_way(
    pair: Pair, monkeypatch: pytest.MonkeyPatch, waits: bool
) -> None:
    """Where that never comes, the request goes on somewhere else."""
    monkeypatch.setattr(worker_module, "_DRAIN_SECONDS", SECONDS if waits else 0.2)
    geometry = pair.worker._engine.pool.geometry
    rank = Owner(Case(geometry.dtype, 3, geometry.head_dim), geometry.num_kv_heads)
    try:
        pair.reserve("a", make_prompt(300))
        rank.signal(signal.SIGSTOP)
        runs = [AnnouncedRun(Place(n, 0, 0), np.arange(3)) for n in range(LAYERS)]
        delivering = pair.loop.submit(pair.worker.deliver("a", 0, (rank.pool, runs)))
        giving_up = pair.loop.submit(pair.worker.go_on("a"))
        if waits:
            with pytest.raises(TimeoutError):
                giving_up.result(0.2)
            rank.signal(signal.SIGKILL)
            assert giving_up.result(SECONDS).done == 0
            assert delivering.done()
        else:
            with pytest.raises(LostError):
                giving_up.result(SECONDS)
            assert not delivering.done()
    finally:
        rank.end()


def test_what_nixl_lacks_is_said_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nixl, "_MODULES", ("nixl_that_is_not_there",))
    with pytest.raises(NoNixlError):
        NixlAgent(Case(torch.bfloat16).make_pool(1))
