"""A decode worker in this process: what waits on it ends, whatever becomes of its engine."""

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.cluster.decode import worker as worker_module
from longreach.cluster.decode.outbox import Said
from longreach.cluster.decode.worker import DecodeWorker
from longreach.cluster.draining import has_work
from longreach.cluster.leases import RENEWAL_SECONDS, TICKS_WITHOUT_RENEWAL
from longreach.cluster.messages import AnswerOrder, ComputedHere
from longreach.cluster.transports.object_store import PageRun
from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.sequences import Reservation
from longreach.engine.errors import (
    CacheTooSmallError,
    DecodeOutOfMemoryError,
    GenerationError,
    GrammarError,
    LostError,
    NotUpError,
    ReceiveOutOfMemoryError,
    TransferError,
    UnavailableError,
)
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import Pages
from longreach.engine.messages import (
    Delta,
    Event,
    Finished,
    GenerationRequest,
    PromptScores,
    SamplingParameters,
    Timings,
)
from longreach.engine.prefill.prefiller import Prefiller

from ..conftest import make_settings

LEASE = RENEWAL_SECONDS * TICKS_WITHOUT_RENEWAL
WAITS = 1.0
"""Seconds after which something that waits is taken to wait for good."""


@pytest.fixture
def worker(tmp_path: Path) -> DecodeWorker:
    settings = make_settings(1).worker
    sizes = {"kv_cache_tokens": 1280, "prefill_up_to": 1024, "prefill_at_once": 512}
    decode = settings.decode.model_copy(update=sizes)
    made = DecodeWorker(replace(settings, decode=decode), tmp_path)
    engine_of(made)._pool.memory.zero_()  # nobody hands pages off here
    return made


def engine_of(worker: DecodeWorker) -> Decoder:
    assert isinstance(worker._engine, Decoder)
    return worker._engine


def make_request(name: str, tokens: int = 300, max_tokens: int = 8) -> GenerationRequest:
    sampling = SamplingParameters(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return GenerationRequest(name, np.full(tokens, 65, dtype=np.int32), sampling, arrived=0.0)


def logits_of(worker: DecodeWorker) -> np.ndarray:
    return np.zeros(engine_of(worker)._model.config.vocab_size, dtype=np.float32)


def order_for(listener: str) -> AnswerOrder:
    return AnswerOrder(listener, taken=time.time())


class Answer:
    """What a worker answers to one request, as far as it comes; its listener is its own."""

    def __init__(self) -> None:
        self.said: list[Event] = []

    @property
    def deltas(self) -> list[Delta]:
        return [event for event in self.said if isinstance(event, Delta)]

    @property
    def tokens(self) -> int:
        return sum(len(delta.tokens) for delta in self.deltas)

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def is_whole(self) -> bool:
        return any(isinstance(event, Finished) for event in self.said)

    async def read(self, worker: DecodeWorker, name: str, logits: np.ndarray | None = None) -> None:
        logits = logits_of(worker) if logits is None else logits
        await self.hear(worker, name, worker.answer(name, logits, order_for(name)))

    async def hear(self, worker: DecodeWorker, name: str, work: Coroutine[Any, Any, None]) -> None:
        """What is said to a listener of this name while the worker works, and at the end."""
        listening = asyncio.create_task(self._listen(worker, name))
        try:
            await work
        finally:
            listening.cancel()
            self._note(name, await worker._outboxes.fetch(name, 0.0))

    async def _listen(self, worker: DecodeWorker, name: str) -> None:
        while True:
            self._note(name, await worker.fetch(name))

    def _note(self, name: str, said: Said) -> None:
        for request_id, events in said:
            assert request_id == name
            self.said += events


def break_steps(worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def step() -> None:
        raise error

    monkeypatch.setattr(worker._engine, "step", step)


async def ended(calls: list[Awaitable[object]]) -> list[object]:
    """What each call came to; waiting for good is a failure, and so is being ended by a lease."""
    return await asyncio.wait_for(asyncio.gather(*calls, return_exceptions=True), LEASE / 2)


def test_a_failed_step_ends_all_that_waits_and_refuses_what_comes(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(worker, monkeypatch, RuntimeError("a broken kernel"))

    async def run() -> list[object]:
        await worker.start(None)
        await worker.reserve(make_request("running"))
        await worker.reserve(make_request("in prefill"))
        waiting = [
            asyncio.create_task(worker.reserve(make_request("for pages", tokens=1000))),
            asyncio.create_task(worker.until_released("in prefill")),
        ]
        await asyncio.sleep(0)
        outcomes = await ended([Answer().read(worker, "running"), *waiting])
        late: list[Callable[[], Awaitable[object]]] = [
            lambda: Answer().read(worker, "in prefill"),
            lambda: worker.reserve(make_request("late")),
            worker.check,
        ]
        return outcomes + await ended([call() for call in late])

    for outcome in asyncio.run(run()):
        assert isinstance(outcome, UnavailableError)
        assert "again" in str(outcome)


def test_an_answer_that_fails_is_never_called_whole(worker: DecodeWorker) -> None:
    async def run() -> None:
        await worker.start(None)
        damaged, after = Answer(), Answer()
        await worker.reserve(make_request("damaged"))
        with pytest.raises(GenerationError):
            await damaged.read(worker, "damaged", logits_of(worker) * np.nan)
        assert not damaged.is_whole
        assert worker._engine.usage == 0
        await worker.reserve(make_request("after"))
        await after.read(worker, "after")
        assert after.is_whole
        assert after.tokens == 8

    asyncio.run(run())


async def served(worker: DecodeWorker, name: str) -> Answer:
    """From a page that is handed off to the last token."""
    answer = Answer()
    await worker.deliver(name, 0, [make_run(worker, 0)])
    await answer.read(worker, name)
    return answer


def break_once(target: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The device has no memory left the first time something is called."""
    kept, calls = getattr(target, name), 0

    def small(*arguments: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 1:
            raise torch.OutOfMemoryError("as the allocator says it")
        return kept(*arguments)

    monkeypatch.setattr(target, name, small)


@pytest.mark.parametrize("where", ["receive", "start", "step"])
def test_too_little_memory_ends_one_request_and_the_next_is_served(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    decoder = engine_of(worker)
    target, name = {
        "receive": (decoder._pool, "put"),
        "start": (Reservation, "copy_last_prompt_page"),
        "step": (decoder._step, "launch"),
    }[where]
    break_once(target, name, monkeypatch)

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("big"))
        with pytest.raises((DecodeOutOfMemoryError, ReceiveOutOfMemoryError)):
            await served(worker, "big")
        await worker.release("big")
        assert decoder.usage == 0
        await worker.check()
        await worker.reserve(make_request("after"))
        after = await served(worker, "after")
        assert after.is_whole
        assert after.tokens == 8

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


class HeldUp:
    """A decoder that takes pages only when it is let, as a slow copy would; and which it took."""

    def __init__(self, worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch) -> None:
        self.begun, self.let = threading.Event(), threading.Event()
        self.took: list[int] = []
        self._receive = worker._engine.receive
        monkeypatch.setattr(worker._engine, "receive", self.receive)

    def receive(self, request_id: str, place: Place, pages: Pages) -> None:
        self.begun.set()
        assert self.let.wait(10 * WAITS), "nothing else went on while pages were copied"
        self._receive(request_id, place, pages)
        self.took.append(place.first_page)


def make_run(worker: DecodeWorker, page: int) -> PageRun:
    return PageRun.of(Place(0, page, 0), Pages(engine_of(worker)._pool.memory[0, :1].clone()))


def test_others_are_served_while_pages_are_copied_and_these_come_in_order(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a message is answered only when its pages are there: a sender counts on that."""
    held = HeldUp(worker, monkeypatch)

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("slow"))
        taking = [
            asyncio.create_task(worker.deliver("slow", 0, [make_run(worker, page)]))
            for page in range(3)
        ]
        while not held.begun.is_set():
            await asyncio.sleep(0.001)
        await worker.check()
        await worker.reserve(make_request("other"))
        other = Answer()
        await other.read(worker, "other")
        assert other.is_whole
        assert not any(each.done() for each in taking)
        held.let.set()
        await asyncio.gather(*taking)
        assert held.took == [0, 1, 2]

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


def test_pages_that_are_being_received_go_back_only_after_the_copy(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = HeldUp(worker, monkeypatch)

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("a"))
        taking = asyncio.create_task(worker.deliver("a", 0, [make_run(worker, 0)]))
        while not held.begun.is_set():
            await asyncio.sleep(0.001)
        releasing = asyncio.create_task(worker.release("a"))
        await worker.until_released("a")
        assert worker._engine.usage > 0
        with pytest.raises(TransferError):
            await worker.deliver("a", 0, [make_run(worker, 1)])
        held.let.set()
        await releasing
        await taking
        assert held.took == [0]
        assert worker._engine.usage == 0

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


def test_a_device_that_breaks_as_pages_are_copied_fails_the_worker(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else it would stay, and every request after would end the same way."""

    def broken(*arguments: Any) -> int:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(worker._engine, "receive", broken)

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("a"))
        with pytest.raises(RuntimeError, match="illegal memory access"):
            await worker.deliver("a", 0, [make_run(worker, 0)])
        with pytest.raises(UnavailableError):
            await worker.check()

    asyncio.run(run())


def test_a_request_that_can_never_fit_is_told_so_at_once(worker: DecodeWorker) -> None:
    """Also while others hold pages: it must not wait for those."""

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("small"))
        with pytest.raises(CacheTooSmallError) as refused:
            await worker.reserve(make_request("huge", tokens=1300))
        assert vars(refused.value) == {"phase": "decode", "needed": 1408, "total": 1280}
        await worker.reserve(make_request("after"))

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


def test_a_request_that_nobody_wants_is_released_and_its_answer_never_called_whole(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its ingress is gone, or what it said was lost."""
    monkeypatch.setattr(worker_module, "RENEWAL_SECONDS", 0.001)
    monkeypatch.setattr(worker._leases, "tick", lambda: ["orphan"] if orphan.tokens else [])
    orphan = Answer()

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("orphan", max_tokens=900))
        waiting = asyncio.create_task(worker.reserve(make_request("other", tokens=900)))
        with pytest.raises(UnavailableError):
            await orphan.read(worker, "orphan")
        assert not orphan.is_whole
        await waiting
        with pytest.raises(UnavailableError):
            await worker.reserve(make_request("orphan"))

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


def test_a_request_that_is_released_while_it_waits_for_pages_is_told(worker: DecodeWorker) -> None:
    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("holder", tokens=900))
        waiting = asyncio.create_task(worker.reserve(make_request("waiting", tokens=900)))
        released = asyncio.create_task(worker.until_released("waiting"))
        await asyncio.sleep(0.01)
        await worker.release("waiting")
        await released
        with pytest.raises(UnavailableError):
            await waiting

    asyncio.run(asyncio.wait_for(run(), 10 * WAITS))


def held(name: str, grammar: str) -> GenerationRequest:
    request = make_request(name)
    return replace(request, sampling=replace(request.sampling, grammar=grammar))


def test_answers_are_held_to_a_grammar(worker: DecodeWorker) -> None:
    async def run() -> str:
        await worker.start(None)
        await worker.reserve(held("held", 'start: "a" /[0-9]/ "b"'))
        answer = Answer()
        await answer.read(worker, "held")
        with pytest.raises(GrammarError):
            await worker.reserve(held("wrong", "start: ("))
        assert worker._engine.usage == 0
        return answer.text

    text = asyncio.run(run())
    assert (text[0], text[2:]) == ("a", "b")
    assert text[1].isdigit()


def test_a_grammar_is_compiled_beside_the_loop_and_may_come_too_late(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A request that left meanwhile gets no pages."""
    goes_on, prepare = threading.Event(), worker._engine.prepare

    def slow(request: GenerationRequest) -> object:
        assert goes_on.wait(10 * WAITS)
        return prepare(request)

    monkeypatch.setattr(worker._engine, "prepare", slow)

    async def run() -> None:
        await worker.start(None)
        leaving = asyncio.create_task(worker.reserve(held("leaves", 'start: "a"')))
        await asyncio.sleep(0)
        await worker.reserve(make_request("other"))  # the loop goes on
        await worker.release("leaves")
        goes_on.set()
        with pytest.raises(UnavailableError):
            await leaving
        await worker.release("other")
        assert worker._engine.usage == 0

    asyncio.run(run())


async def generated(worker: DecodeWorker, request: GenerationRequest) -> tuple[list[Any], Answer]:
    """What a worker says of a prompt that it computes itself, and what it answers."""
    prompt: list[Any] = []
    answer = Answer()

    async def hear() -> None:
        async for event in worker.generate(request, order_for(request.request_id)):
            prompt.append(event)

    await answer.hear(worker, request.request_id, hear())
    assert answer.is_whole
    return prompt, answer


def test_a_worker_computes_a_prompt_and_says_when(worker: DecodeWorker) -> None:
    async def run() -> None:
        await worker.start(None)
        before = time.time()
        request = replace(make_request("a", tokens=600, max_tokens=2), arrived=before)
        (*progress, computed), answer = await generated(worker, request)
        assert [each.done for each in progress] == [512]
        assert isinstance(computed, ComputedHere)
        assert before <= computed.began < computed.ended <= time.time()
        assert 0 < computed.seconds <= computed.ended - computed.began + 1e-6
        assert answer.tokens == 2
        assert answer.deltas[-1].finish_reason == "length"
        finished = answer.said[-1]
        assert isinstance(finished, Finished)
        assert (finished.prompt_tokens, finished.completion_tokens) == (600, 2)
        timings = finished.timings
        assert timings.queued == computed.began - before
        assert timings.prefill == computed.ended - computed.began
        assert timings.prefill_stages == {"steps": computed.seconds}
        assert 0 <= timings.first_token < timings.served
        assert worker._engine.usage == 0

    asyncio.run(run())


def test_an_answer_after_a_hand_off_has_the_gangs_times_and_its_scores_first(
    worker: DecodeWorker,
) -> None:
    scores = PromptScores(np.zeros((299, 2), dtype=np.float32))
    prompt = Timings(0.5, 1.0, 0.25, 0.0, 0.0, {"linear": 0.1})

    async def run() -> None:
        await worker.start(None)
        await worker.reserve(make_request("a", max_tokens=3))
        now = time.time()
        order = AnswerOrder("a", now - 2.0, prompt, now, scores)
        answer = Answer()
        await answer.hear(worker, "a", worker.answer("a", logits_of(worker), order))
        assert answer.said[0] is scores
        finished = answer.said[-1]
        assert isinstance(finished, Finished)
        assert finished.completion_tokens == 3
        timings = finished.timings
        assert (timings.queued, timings.prefill, timings.hand_off) == (0.5, 1.0, 0.25)
        assert timings.prefill_stages == {"linear": 0.1}
        assert 0 <= timings.first_token < 2.0 <= timings.served

    asyncio.run(run())


def test_it_says_what_it_would_after_a_hand_off(worker: DecodeWorker) -> None:
    """Both ways have the same first pages, tokens and log-probabilities."""
    engine = engine_of(worker)
    prefiller = Prefiller(engine._model, engine._pool, None)

    async def handed_off(request: GenerationRequest) -> Answer:
        await worker.reserve(request)
        prefiller.admit("a", request.prompt, engine.block_table(request.request_id))
        logits = prefiller.run_chunk("a", 0, len(request.prompt)).logits
        assert logits is not None
        prefiller.release("a")
        answer = Answer()
        await answer.read(worker, request.request_id, logits.numpy())
        return answer

    async def run() -> None:
        await worker.start(None)
        there = await handed_off(make_request("there"))
        _, here = await generated(worker, make_request("here"))
        assert here.text == there.text
        tokens = [[token for d in each.deltas for token in d.tokens] for each in (here, there)]
        assert len(tokens[0]) == 8
        for mine, theirs in zip(*tokens, strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)

    asyncio.run(run())


def test_requests_that_lack_pages_wait_and_all_end_well(worker: DecodeWorker) -> None:
    """Ten pages, and five requests that need two each at first, and three at their ends."""

    async def run() -> None:
        await worker.start(None)
        requests = [make_request(f"r{n}", tokens=250, max_tokens=12) for n in range(5)]
        answers = [generated(worker, request) for request in requests]
        for _, answer in await asyncio.wait_for(asyncio.gather(*answers), 100 * WAITS):
            assert answer.tokens == 12
        assert engine_of(worker).num_preemptions > 0
        assert worker._engine.usage == 0

    asyncio.run(run())


@pytest.mark.parametrize("before", [True, False])
def test_a_release_ends_an_answer_that_is_computed_here(worker: DecodeWorker, before: bool) -> None:
    async def run() -> None:
        await worker.start(None)
        request = make_request("a", tokens=600, max_tokens=400)
        if before:
            await worker.release("a")
        reading = asyncio.create_task(generated(worker, request))
        await asyncio.sleep(0.05)
        await worker.release("a")
        with pytest.raises(UnavailableError):
            await asyncio.wait_for(reading, 10 * WAITS)
        assert worker._engine.usage == 0

    asyncio.run(run())


def test_a_failed_step_ends_what_is_computed_here(
    worker: DecodeWorker, monkeypatch: pytest.MonkeyPatch
) -> None:
    break_steps(worker, monkeypatch, RuntimeError("a broken kernel"))

    async def run() -> None:
        await worker.start(None)
        [outcome] = await ended([generated(worker, make_request("a"))])
        assert isinstance(outcome, LostError)
        [late] = await ended([generated(worker, make_request("b"))])
        assert isinstance(late, NotUpError)

    asyncio.run(run())


def test_a_step_is_one_message_to_an_ingress_and_who_is_late_gets_more_in_one(
    worker: DecodeWorker,
) -> None:
    """Two requests of one ingress, and one of another, which comes late."""

    async def run() -> None:
        await worker.start(None)
        names = {"a": "one", "b": "one", "late": "other"}
        requests = [
            asyncio.create_task(drained(worker, make_request(name, tokens=20), names[name]))
            for name in names
        ]
        messages: list[dict[str, list[Event]]] = []

        async def listen() -> None:
            while True:
                messages.append(dict(await worker.fetch("one")))

        listening = asyncio.create_task(listen())
        await asyncio.gather(*requests)
        listening.cancel()
        messages.append(dict(await worker._outboxes.fetch("one", 0.0)))
        assert {"a", "b"} in [set(message) for message in messages]
        for name in ("a", "b"):
            own = [event for message in messages for event in message.get(name, [])]
            assert sum(len(each.tokens) for each in own if isinstance(each, Delta)) == 8
            assert isinstance(own[-1], Finished)
        [(name, (delta, finished))] = await worker.fetch("other")
        assert name == "late"
        assert isinstance(delta, Delta)
        assert (len(delta.tokens), delta.finish_reason) == (8, "length")
        assert isinstance(finished, Finished)

    asyncio.run(asyncio.wait_for(run(), 20 * WAITS))


async def drained(worker: DecodeWorker, request: GenerationRequest, listener: str) -> None:
    """Its prompt and answer, said to an ingress."""
    async for _ in worker.generate(request, order_for(listener)):
        pass


def test_who_lets_a_node_go_sees_what_a_worker_holds(worker: DecodeWorker, tmp_path: Path) -> None:
    """Pages that a gang fills, and a prompt that is computed here, with the room for its answer."""

    async def run() -> None:
        await worker.start(None)
        assert not has_work(tmp_path)
        await worker.reserve(make_request("a"))
        assert has_work(tmp_path)
        await worker.release("a")
        assert not has_work(tmp_path)
        # As long as there is room for: it must not be over before it is looked for.
        long = make_request("b", max_tokens=900)
        async for _ in worker.generate(long, order_for("one")):
            assert has_work(tmp_path)
            break
        else:
            pytest.fail("nothing was said of the prompt")
        await worker.release("b")
        assert not has_work(tmp_path)

    asyncio.run(asyncio.wait_for(run(), 20 * WAITS))
