"""Hand-offs that are made to fail, over vLLM itself: `make test-vllm`.

The decode worker, a prefill rank and the transport between them are real, in this process and on a
CPU; only Ray is replaced. vLLM must have every block again, whatever happened, and whoever is
served beside must not notice.
"""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch

from longreach.cluster.decode import engines
from longreach.cluster.transports import actor_messages
from longreach.cluster.transports.object_store import PageRun
from longreach.engine.decode.contract import DecodeEngine
from longreach.engine.errors import TransferError, UnavailableError
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import Pages
from longreach.engine.messages import GenerationRequest, SamplingParameters
from longreach.kernels.page_size import PAGE_TOKENS, pages_for
from longreach.plugins.vllm_decode.decoder import VllmDecoder

from ...cluster.conftest import wait_for
from ...cluster.decode.test_worker import Answer, order_for
from ...cluster.transports.pair import (
    CHUNK_TOKENS,
    SECONDS,
    Pair,
    chunks_of,
    make_prompt,
    replace_ray,
    settings_of,
)
from .conftest import PAGES

pytestmark = pytest.mark.live

PROMPT = make_prompt(2301)
BESIDE_TOKENS = 300
WAITS = 0.5
"""Seconds after which something that waits is taken to wait for good."""


@pytest.fixture
def pair(decoder: VllmDecoder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Pair]:
    replace_ray(monkeypatch)
    monkeypatch.setattr(engines, "make_engine", lambda *given: decoder)
    assert free_blocks(decoder) == PAGES
    made = Pair(settings_of("object_store", "auto"), tmp_path)
    try:
        yield made
        wait_for(lambda: free_blocks(decoder) == PAGES, 10, "vLLM has all of its blocks")
        wait_for(lambda: not decoder.has_work, 10, "vLLM has nothing to do")
        assert is_forgotten(decoder)
    finally:
        made.end()


def free_blocks(decoder: DecodeEngine) -> int:
    """As vLLM's own pool of blocks counts them."""
    return vllm_of(decoder)._pool.get_num_free_blocks()


def is_forgotten(decoder: VllmDecoder) -> bool:
    """Whether nothing of any request is left: in vLLM, at either end of the connector, with us."""
    core = vllm_of(decoder)
    scheduler, working = core._scheduler, core._working
    left = (scheduler.requests, scheduler.finished_recving_kv_req_ids, working._arrived)
    ours = (core._scheduling.blocks, core._sequences, core._shared, core._begun)
    ours += (core._figures._sequences, decoder._taken)
    return not any(map(len, (*left, *ours)))


def vllm_of(decoder: DecodeEngine) -> Any:
    assert isinstance(decoder, VllmDecoder)
    return decoder._core


def beside(pair: Pair, name: str = "beside") -> "Future[int]":
    """A request that vLLM computes itself and then generates for; how many tokens came of it."""
    sampling = SamplingParameters(max_tokens=BESIDE_TOKENS, temperature=0.0, ignore_eos=True)
    request = GenerationRequest(name, make_prompt(200), sampling, 0.0)

    async def work() -> None:
        async for _ in pair.worker.generate(request, order_for(name)):
            pass

    async def read() -> int:
        said = Answer()
        await said.hear(pair.worker, name, work())
        assert said.is_whole
        return said.tokens

    return pair.loop.submit(read())


def handed_off(pair: Pair, name: str) -> list[int]:
    """The answer to the prompt, handed off undisturbed."""
    pair.reserve(name, PROMPT)
    logits, failure = pair.prefill(name, PROMPT)
    assert failure is None
    assert logits is not None
    return pair.answer(name, logits)


def release(pair: Pair, name: str) -> None:
    """As the request's life does when it ends, however it ends."""
    pair.loop.run(pair.worker.release(name))


class Faulty:
    """The transport's receiver, which does what a test wants with each message but the first few.

    Args:
        after: messages that go through.
    """

    def __init__(self, pair: Pair, after: int, fault: Callable[[], object]) -> None:
        self._receiver, self._after, self._fault = pair.worker._receiver, after, fault
        self._receive = self._receiver.receive
        self.came = 0
        vars(self._receiver)["receive"] = self.receive

    def receive(self, request_id: str, message: Any) -> int:
        self.came += 1
        if self.came > self._after:
            self._fault()
        return self._receive(request_id, message)

    def mend(self) -> None:
        del vars(self._receiver)["receive"]


@pytest.mark.parametrize("after", [0, 1, 3])
def test_pages_that_are_refused_end_their_request_and_no_other(pair: Pair, after: int) -> None:
    """And the same prompt, asked again, is not answered from pages of which half came."""
    decoder = pair.worker._engine
    expected = handed_off(pair, "calm")

    def refuse() -> None:
        raise TransferError("refused on purpose")

    others = beside(pair)
    pair.reserve("broken", PROMPT)
    faulty = Faulty(pair, after, refuse)
    pair.compute("broken", PROMPT, chunks_of(PROMPT))
    failure = pair.rank.flush("broken")
    assert failure is not None
    assert "refused on purpose" in failure
    assert faulty.came > after
    # Nothing is freed behind the back of whoever may still write.
    assert free_blocks(decoder) <= PAGES - pages_for(len(PROMPT))
    pair.rank.release("broken")
    release(pair, "broken")
    faulty.mend()
    assert others.result(SECONDS) == BESIDE_TOKENS
    assert handed_off(pair, "again") == expected


def test_pages_of_another_shape_are_refused_by_vllms_blocks(pair: Pair) -> None:
    others = beside(pair)
    pair.reserve("a", PROMPT)
    geometry = pair.worker._engine.pool.geometry
    heads, size = geometry.num_kv_heads, geometry.head_dim
    for place, pages in (
        (Place(0, 0, 0), torch.zeros(1, heads, 2, PAGE_TOKENS, size // 2)),
        (Place(0, 0, 1), torch.zeros(1, heads, 2, PAGE_TOKENS, size)),
        (Place(0, 17, 0), torch.zeros(2, heads, 2, PAGE_TOKENS, size)),
    ):
        with pytest.raises(TransferError):
            pair.loop.run(pair.worker.deliver("a", 0, [PageRun.of(place, Pages(pages))]))
    release(pair, "a")
    assert others.result(SECONDS) == BESIDE_TOKENS


def test_a_copy_that_hangs_keeps_its_blocks_until_it_has_ended(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever got them meanwhile would find them written over."""
    monkeypatch.setattr(actor_messages, "ANSWER_SECONDS", WAITS)
    decoder, hangs = pair.worker._engine, threading.Event()
    pair.reserve("stuck", PROMPT)
    faulty = Faulty(pair, 1, lambda: hangs.wait(SECONDS))
    try:
        pair.compute("stuck", PROMPT, chunks_of(PROMPT))
        failure = pair.rank.flush("stuck")
        assert failure is not None
        assert "took no pages" in failure
        pair.rank.release("stuck")
        releasing = pair.loop.submit(pair.worker.release("stuck"))
        # It steps meanwhile.
        assert beside(pair).result(SECONDS) == BESIDE_TOKENS
        assert not releasing.done()
        assert free_blocks(decoder) == PAGES - pages_for(len(PROMPT))
    finally:
        hangs.set()
        faulty.mend()
    releasing.result(SECONDS)


@pytest.mark.parametrize("came", [0, 1, 2])
@pytest.mark.parametrize("ends", ["client", "lease"])
def test_pages_that_never_come_are_waited_for_until_nobody_wants_them(
    pair: Pair, came: int, ends: str
) -> None:
    """A client that leaves says so; one whose ingress has died says nothing any more."""
    decoder = pair.worker._engine
    pair.reserve("a", PROMPT)
    told = pair.loop.submit(pair.worker.until_released("a"))
    if came:
        pair.compute("a", PROMPT, range(came))
        assert pair.rank.flush("a") is None
    assert beside(pair).result(SECONDS) == BESIDE_TOKENS
    assert decoder.complete_tokens("a") == came * CHUNK_TOKENS
    assert free_blocks(decoder) == PAGES - pages_for(len(PROMPT))
    assert not told.done()
    if ends == "client":
        release(pair, "a")
    else:
        lapsed = iter([["a"]])
        pair.worker._leases.tick = lambda: next(lapsed, [])
    told.result(SECONDS)
    wait_for(lambda: free_blocks(decoder) == PAGES, 10, "its blocks are free")
    if came:
        # The gang knows nothing of it yet.
        _, _ = pair.compute("a", PROMPT, range(came, came + 1), is_there=True)
        failure = pair.rank.flush("a")
        assert failure is not None
        assert "takes no pages" in failure
        pair.rank.release("a")
    with pytest.raises(UnavailableError):
        pair.reserve("a", PROMPT)


def test_another_gang_goes_on_behind_what_lies_in_vllms_blocks(pair: Pair) -> None:
    """The first one's hand-off breaks, and what it had brought is read back."""
    expected = handed_off(pair, "calm")
    others = beside(pair)
    pair.reserve("a", PROMPT)
    pair.compute("a", PROMPT, range(2))
    assert pair.rank.flush("a") is None
    assert pair.go_on("a") == 2 * CHUNK_TOKENS
    pair.compute("a", PROMPT, range(2, 3), is_there=True)
    failure = pair.rank.flush("a")
    assert failure is not None
    assert "goes on with another gang" in failure
    pair.rank.release("a")
    pair.rank._prefiller._pool.clear()  # the next one has nothing of the first
    logits, failure = pair.compute("a", PROMPT, chunks_of(PROMPT), back=2)
    assert failure is None
    assert pair.rank.flush("a") is None
    assert logits is not None
    assert pair.answer("a", logits) == expected
    assert others.result(SECONDS) == BESIDE_TOKENS


@pytest.mark.parametrize("seconds", [0.0, 0.02, 0.1, 0.3])
def test_a_client_that_leaves_while_pages_are_copied_leaves_no_block(
    pair: Pair, seconds: float
) -> None:
    """Whatever is under way: copies, a push of the gang, or vLLM's allocation."""
    others = beside(pair)
    pair.reserve("a", PROMPT)
    pushing = threading.Thread(target=pair.compute, args=("a", PROMPT, chunks_of(PROMPT)))
    pushing.start()
    time.sleep(seconds)
    release(pair, "a")
    pushing.join(SECONDS)
    pair.rank.flush("a")
    pair.rank.release("a")
    assert others.result(SECONDS) == BESIDE_TOKENS
