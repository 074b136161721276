"""Pages that one process computes and another reads where they lie.

On a CPU memory is shared as PyTorch's processes share it; on a GPU by CUDA IPC, with two processes
on one card.
"""

import dataclasses
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import pytest
import torch
from torch.multiprocessing.spawn import spawn

from longreach.cluster.transports import shared_pages
from longreach.cluster.transports.announced import AnnouncedRun
from longreach.cluster.transports.shared_pages import SharedPageReader, SharedPool
from longreach.engine.errors import CannotMapPagesError, CannotSharePagesError, OtherHostError
from longreach.engine.kv.background import BackgroundHandOff, hand_off_stream
from longreach.engine.kv.hand_off import HandOff, Place
from longreach.engine.kv.host_copies import HostCopies
from longreach.engine.kv.pages import HeldPages, PageGeometry, PagePool, Pages, page_index
from longreach.engine.parallel.mesh import Mesh

from ...processes import forking

LAYERS, HEADS, RANK_HEADS = 3, 5, 2
"""The owner is one of several ranks: it has some of the heads that the reader has."""

FIRST_HEAD, FIRST_PAGE = 2, 3
ROUNDS = 4
HOST = "here"
SECONDS = 120.0

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA IPC needs a GPU")
DEVICES = [pytest.param("cpu"), pytest.param("cuda", marks=needs_gpu)]


@dataclass(frozen=True)
class Case:
    """A pool of its size on a device, and which of its pages travel."""

    device: str
    dtype: torch.dtype
    apart: bool

    @property
    def pages(self) -> int:
        """On a GPU so many that a copy which began too early, or ended too late, would show."""
        return 12 if self.device == "cpu" else 500

    @property
    def numbers(self) -> np.ndarray:
        """Of the pages that travel, in the owner's pool."""
        count = self.pages - 4
        every = np.arange(2, 2 + count)
        return np.random.default_rng(0).permutation(every) if self.apart else every

    def make_pool(self, heads: int, pages: int) -> PagePool:
        geometry = PageGeometry(LAYERS, heads, 64, self.dtype)
        pool = PagePool(geometry, pages, torch.device(self.device))
        if pool.scales is None:
            pool.memory.fill_(torch.nan)
        else:
            pool.memory.view(torch.uint8).fill_(0x7F)  # e4m3's NaN
            pool.scales.fill_(torch.nan)
        return pool

    def values(self, turn: int, layer: int) -> Pages:
        """What a layer's travelling pages hold, the same in each process."""
        generator = torch.Generator().manual_seed(turn * LAYERS + layer)
        shape = (len(self.numbers), RANK_HEADS, 2)
        values = torch.randn(*shape, 128, 64, generator=generator).to(self.dtype)
        quantized = self.dtype == torch.float8_e4m3fn
        scales = torch.rand(shape, generator=generator) if quantized else None
        return Pages(values, scales).on(torch.device(self.device))


class ConnectionSender(HandOff):
    """Announces pages through a pipe, one after the other, and waits for each answer."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def push(self, place: Place, pages: HeldPages) -> None:
        self._connection.send(AnnouncedRun(place, pages.numbers))
        assert self._connection.recv() == "copied"

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None: ...
    def flush(self) -> None: ...
    def abandon(self) -> None: ...


def own(case: Case, connection: Connection, queue: Any) -> None:
    """A rank: writes pages, hands them off, and writes over them when that has ended."""
    pool = case.make_pool(RANK_HEADS, case.pages)
    queue.put(SharedPool.of(pool, HOST))
    table = torch.from_numpy(case.numbers).to(pool.memory.device)
    index = page_index(case.numbers, pool.memory.device)
    stream = hand_off_stream(pool.memory.device)
    sender = BackgroundHandOff(ConnectionSender(connection), stream, Mesh.single)
    for turn in range(ROUNDS):
        written = [case.values(turn, layer) for layer in range(LAYERS)]
        if case.device == "cuda":
            # The host is far ahead when it pushes: nothing has been written yet.
            torch.cuda._sleep(200_000_000)
        for layer, pages in enumerate(written):
            pool.put(layer, table, 0, pages)
            held = HeldPages(pool.layer(layer), case.numbers, index)
            sender.push(Place(layer, FIRST_PAGE, FIRST_HEAD), held)
        sender.flush()
        connection.send("round")
    sender.abandon()
    connection.recv()


class Owner:
    """The other process, and the pool that it shares."""

    def __init__(self, case: Case) -> None:
        context = forking()
        self.connection, theirs = context.Pipe()
        queue = context.Queue()
        self.process = context.Process(target=own, args=(case, theirs, queue), daemon=True)
        self.process.start()
        theirs.close()
        self.pool: SharedPool = queue.get(timeout=SECONDS)

    def next(self) -> Any:
        assert self.connection.poll(SECONDS), f"the owner says nothing; {self.process}"
        return self.connection.recv()

    def end(self) -> None:
        self.process.kill()
        self.process.join(SECONDS)


class Receiver:
    """A pool of all heads, filled with NaN, and where one request's pages lie in it."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.pool = case.make_pool(HEADS, case.pages + 8)
        order = np.random.default_rng(1).permutation(case.pages + 8)
        self.table = torch.from_numpy(order).to(self.pool.memory.device)
        device = self.pool.memory.device
        self.reader = SharedPageReader(HOST, device, hand_off_stream(device), self.receive)

    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        table = self.table[place.first_page : place.first_page + len(pages)]
        self.pool.put(place.layer, table, place.first_kv_head, pages)

    def check(self, turn: int, layer: int) -> None:
        """The pages that came have what the owner wrote, and all other pages nothing."""
        case, pool, where = self.case, self.pool, f"round {turn}, layer {layer}"
        expected, there = case.values(turn, layer), pool.layer(layer).at(self.table)
        rows = slice(FIRST_PAGE, FIRST_PAGE + len(expected))
        own = Pages(there.values[rows], None if there.scales is None else there.scales[rows]).heads(
            FIRST_HEAD, RANK_HEADS
        )
        wrong = (own.values.float() != expected.values.float()).flatten(1).any(1)
        assert not wrong.any(), f"{where}: {int(wrong.sum())} of {len(wrong)} pages are wrong"
        if own.scales is not None and expected.scales is not None:
            assert torch.equal(own.scales, expected.scales), f"{where}: scales"
        others = there.values.float().isnan().flatten(2).all(2)
        others[rows, FIRST_HEAD : FIRST_HEAD + RANK_HEADS] = True
        assert others.all(), f"{where}: pages were written that did not come"


@pytest.mark.parametrize("apart", [False, True], ids=["neighbours", "apart"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("device", DEVICES)
def test_pages_are_read_when_they_are_written_and_before_they_are_overwritten(
    device: str, dtype: torch.dtype, apart: bool
) -> None:
    case = Case(device, dtype, apart)
    hand_off(Owner(case), Receiver(case))


def hand_off(owner: Owner, receiver: Receiver) -> None:
    """Read all that the owner announces, and check it."""
    case = receiver.case
    try:
        for turn in range(ROUNDS):
            copied = 0
            while (run := owner.next()) != "round":
                copied += receiver.reader.read("a", owner.pool, [run])
                owner.connection.send("copied")
                receiver.check(turn, run.place.layer)
            assert copied == sum(case.values(turn, layer).nbytes for layer in range(LAYERS))
        receiver.reader.close("a")
    finally:
        owner.end()


def read_from_another_card(rank: int, case: Case) -> None:
    """In a process that sees one card, from one that sees the other, as Ray's actors do."""
    receiver = Receiver(case)
    os.environ["CUDA_VISIBLE_DEVICES"] = "1"  # this process has its card already
    hand_off(Owner(case), receiver)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs of one host")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_pages_are_read_from_another_card(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    spawn(read_from_another_card, (Case("cuda", dtype, True),), nprocs=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
@pytest.mark.parametrize("device", DEVICES)
def test_pages_come_to_the_host_whole_whatever_came_before(device: str, dtype: torch.dtype) -> None:
    case, copies = Case(device, dtype, True), HostCopies()
    for count in (3, 8, 1):
        pages = case.values(count, 0).at(slice(count))
        brought = copies.bring(pages)
        assert brought.values.device.type == "cpu"
        assert brought.values.dtype == dtype
        assert torch.equal(brought.values.float(), pages.values.float().cpu())
        assert (brought.scales is None) == (dtype == torch.bfloat16)
        if brought.scales is not None and pages.scales is not None:
            assert torch.equal(brought.scales, pages.scales.cpu())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn], ids=["bf16", "fp8"])
def test_some_heads_of_a_pool_may_be_meant(dtype: torch.dtype) -> None:
    """A tensor rank reads its own of decode's pages."""
    case = Case("cpu", dtype, True)
    pool, receiver = case.make_pool(HEADS, case.pages), Receiver(case)
    values = torch.randn(case.pages, HEADS, 2, 128, 64).to(dtype)
    scales = torch.rand(case.pages, HEADS, 2) if pool.scales is not None else None
    pool.put(1, torch.arange(case.pages), 0, Pages(values, scales))
    heads = range(1, 1 + RANK_HEADS)
    run = AnnouncedRun(Place(1, FIRST_PAGE, FIRST_HEAD), case.numbers, heads)
    receiver.reader.read("a", SharedPool.of(pool, HOST), [run])
    there = receiver.pool.layer(1).at(receiver.table[FIRST_PAGE : FIRST_PAGE + len(case.numbers)])
    own = there.heads(FIRST_HEAD, RANK_HEADS)
    expected = pool.layer(1).at(torch.from_numpy(case.numbers)).heads(1, RANK_HEADS)
    assert torch.equal(own.bits, expected.bits)
    if own.scales is not None and expected.scales is not None:
        assert torch.equal(own.scales, expected.scales)


def test_a_pool_of_another_host_is_refused_with_both_hosts() -> None:
    case = Case("cpu", torch.bfloat16, False)
    pool = SharedPool.of(case.make_pool(RANK_HEADS, case.pages), "elsewhere")
    run = AnnouncedRun(Place(0, FIRST_PAGE, FIRST_HEAD), case.numbers)
    with pytest.raises(OtherHostError) as refused:
        Receiver(case).reader.read("a", pool, [run])
    assert vars(refused.value) == {"host": "elsewhere", "wanted_on": HOST}


def test_memory_that_cannot_be_mapped_is_refused_with_the_reason() -> None:
    def fail() -> torch.Tensor:
        raise RuntimeError("CUDA error: invalid argument\nCompile with ...")

    case = Case("cpu", torch.bfloat16, False)
    shared = SharedPool.of(case.make_pool(RANK_HEADS, case.pages), HOST)
    broken = dataclasses.replace(shared, memory=((fail, ()),))
    run = AnnouncedRun(Place(0, FIRST_PAGE, FIRST_HEAD), case.numbers)
    with pytest.raises(CannotMapPagesError) as refused:
        Receiver(case).reader.read("a", broken, [run])
    assert refused.value.reason == "CUDA error: invalid argument"


def test_memory_that_cannot_be_shared_is_refused_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def reduce_tensor(tensor: torch.Tensor) -> None:
        raise RuntimeError("cudaMallocAsync does not yet support shareIpcHandle")

    monkeypatch.setattr(shared_pages, "reduce_tensor", reduce_tensor)
    case = Case("cpu", torch.bfloat16, False)
    with pytest.raises(CannotSharePagesError) as refused:
        SharedPool.of(case.make_pool(1, 1), HOST)
    assert refused.value.reason == "cudaMallocAsync does not yet support shareIpcHandle"


def test_a_mapping_ends_with_the_last_request_that_comes_through_it() -> None:
    case = Case("cpu", torch.bfloat16, False)
    pool = case.make_pool(RANK_HEADS, case.pages)
    shared, receiver = SharedPool.of(pool, HOST), Receiver(case)
    mapped = 0

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal mapped
        mapped += 1
        [(function, own)] = shared.memory
        return function(*own)

    counting = dataclasses.replace(shared, memory=((counted, ()),))
    run = AnnouncedRun(Place(1, FIRST_PAGE, FIRST_HEAD), case.numbers)
    for _ in range(3):
        receiver.reader.read("a", counting, [run])
    assert mapped == 1
    receiver.reader.close("a")
    receiver.reader.close("a")
    receiver.reader.read("b", counting, [run])
    assert mapped == 2


@needs_gpu
def test_a_dead_owners_memory_is_free_when_its_requests_have_ended() -> None:
    """Until then it can be read: a copy under way when a rank dies takes nobody with it."""
    case = Case("cuda", torch.bfloat16, True)
    size = case.make_pool(RANK_HEADS, 1).memory.nbytes * case.pages
    owner, receiver = Owner(case), Receiver(case)
    reader = receiver.reader
    runs = []
    while (run := owner.next()) != "round":
        runs.append(run)
        reader.read("a", owner.pool, [run])
        owner.connection.send("copied")
    reader.read("b", owner.pool, runs[:1])
    process = owner.process.pid
    assert process is not None
    os.kill(process, signal.SIGKILL)
    owner.process.join(SECONDS)
    reader.read("a", owner.pool, runs)
    reader.close("a")
    held = torch.cuda.mem_get_info()[0]
    reader.close("b")
    deadline = time.monotonic() + 20
    while (freed := torch.cuda.mem_get_info()[0] - held) < size * 0.9:
        assert time.monotonic() < deadline, f"{freed} of {size} bytes came back in 20 s"
        time.sleep(0.1)
