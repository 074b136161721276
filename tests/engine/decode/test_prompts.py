"""Prompts that a decoder computes itself: the text that a gang's way has, at nobody's cost."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.portable_step import PortableStep
from longreach.engine.decode.prompts import Part, PromptQueue
from longreach.engine.decode.step import PromptLimits
from longreach.engine.errors import (
    CacheTooSmallError,
    GenerationError,
    InvalidRequestError,
    OutOfPagesError,
    StepOutOfMemoryError,
)
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import Delta, GenerationRequest, Progress
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.lab.pocket.tokenizer import build_tokenizer

from ..checkpoints import DUAL_CHUNK, make_checkpoint
from .test_decode import Engine, make_prompt, make_request, tokens_by_choice

LIMITS = PromptLimits(longest=1024, at_once=256, pieces=4)
LENGTHS = [1, 17, 127, 128, 129, 245, 300, 600]
Said = dict[str, dict[int, list[int]]]
"""Tokens of each choice of each request."""

SAMPLING = {"temperature": 1.0, "seed": 7, "max_tokens": 6, "choices": 2}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dual"), dual_chunk=DUAL_CHUNK)


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen2:
    return Qwen2.load(folder, Mesh.single(), torch.float32, torch.device("cpu"))


def make_decoder(
    model: Qwen2,
    pages: int = 60,
    max_batch: int = 4,
    limits: PromptLimits = LIMITS,
    kept: KVCacheDtype = "auto",
) -> Decoder:
    pool = PagePool(model.page_geometry.kept_as(kept), pages, torch.device("cpu"))
    pool.memory.fill_(torch.nan)
    if pool.scales is not None:
        pool.scales.fill_(torch.nan)
    return Decoder(model, pool, TokenBytes(build_tokenizer()), max_batch, limits)


def run(decoder: Decoder) -> list:
    outputs = []
    while decoder.has_work:
        outputs += decoder.step()
    return outputs


def tokens(outputs: list, name: str) -> dict[int, list[int]]:
    return tokens_by_choice([each for each in outputs if isinstance(each[1], Delta)], name)


def admitted_alone(model: Qwen2, length: int, **sampling) -> dict[int, list[int]]:
    decoder = make_decoder(model, pages=200)
    decoder.admit(make_request("a", make_prompt(length, seed=length), **sampling))
    return tokens(run(decoder), "a")


@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_same_text_whichever_way_a_prompt_goes(
    folder: Path, model: Qwen2, length: int, kept: KVCacheDtype
) -> None:
    prompt = make_prompt(length, seed=length)
    handed_off = Engine(folder, kept=kept).generate("a", prompt, **SAMPLING)
    decoder = make_decoder(model, kept=kept)
    decoder.admit(make_request("a", prompt, **SAMPLING))
    assert tokens(run(decoder), "a") == handed_off
    assert decoder.usage == 0


def test_many_prompts_at_once_are_equal_to_each_alone(model: Qwen2) -> None:
    decoder = make_decoder(model, max_batch=20)
    for length in LENGTHS:
        prompt = make_prompt(length, seed=length)
        decoder.admit(make_request(f"r{length}", prompt, **SAMPLING))
    outputs = run(decoder)
    for length in LENGTHS:
        assert tokens(outputs, f"r{length}") == admitted_alone(model, length, **SAMPLING)
    assert decoder.usage == 0


def test_others_get_a_token_with_every_part_of_a_prompt(model: Qwen2) -> None:
    decoder = make_decoder(model)
    decoder.admit(make_request("first", make_prompt(10), max_tokens=40))
    decoder.step()
    decoder.admit(make_request("long", make_prompt(1000), max_tokens=3))
    done = []
    while decoder.num_prompts:
        outputs = decoder.step()
        assert next(name for name, each in outputs if isinstance(each, Delta)) == "first"
        done += [each.done for name, each in outputs if isinstance(each, Progress)]
    assert done == [256, 512, 768, 1000]


def test_a_prompt_is_computed_with_a_place_in_the_batch_and_not_before(model: Qwen2) -> None:
    decoder = make_decoder(model, max_batch=2)
    decoder.admit(make_request("two", make_prompt(40), max_tokens=5, choices=2))
    decoder.step()
    decoder.admit(make_request("late", make_prompt(50), max_tokens=2))
    outputs = [output for _ in range(3) for output in decoder.step()]
    assert {name for name, _ in outputs} == {"two"}
    outputs = run(decoder)
    assert [type(each) for name, each in outputs if name == "late"] == [Progress, Delta, Delta]


def test_more_choices_than_places_are_served_all_the_same(model: Qwen2) -> None:
    decoder = make_decoder(model, max_batch=2)
    decoder.admit(make_request("a", make_prompt(40), max_tokens=3, choices=5))
    assert [len(each) for each in tokens(run(decoder), "a").values()] == [3] * 5


def test_a_million_and_a_prompt_that_was_admitted_share_a_batch(folder: Path, model: Qwen2) -> None:
    """One that was handed off and one that was computed here."""
    prompt = make_prompt(300)
    expected = Engine(folder).generate("handed", prompt, max_tokens=9)
    decoder = make_decoder(model)
    engine = Engine(folder)
    engine.decoder = decoder
    decoder.reserve(make_request("handed", prompt, max_tokens=9))
    logits = engine.hand_off("handed", prompt)
    decoder.admit(make_request("r600", make_prompt(600, seed=600), **SAMPLING))
    outputs = decoder.start("handed", logits)
    outputs += run(decoder)
    assert tokens(outputs, "handed") == expected
    assert tokens(outputs, "r600") == admitted_alone(model, 600, **SAMPLING)


def test_what_cannot_be_admitted_is_refused_and_takes_nothing(model: Qwen2) -> None:
    decoder = make_decoder(model, pages=5)
    with pytest.raises(InvalidRequestError):
        decoder.admit(make_request("a", make_prompt(1025)))
    with pytest.raises(InvalidRequestError):
        decoder.admit(make_request("a", make_prompt(10), prompt_logprobs=0))
    with pytest.raises(CacheTooSmallError):
        decoder.admit(make_request("a", make_prompt(600), max_tokens=100))
    decoder.admit(make_request("a", make_prompt(300)))
    with pytest.raises(InvalidRequestError):
        decoder.admit(make_request("a", make_prompt(30)))
    with pytest.raises(OutOfPagesError):
        decoder.admit(make_request("b", make_prompt(300)))
    assert decoder.usage == 3 / 5
    decoder.cancel("a")
    assert decoder.usage == 0
    assert not decoder.has_work


@pytest.mark.parametrize("steps", [0, 1, 2, 3, 4])
def test_cancelling_gives_every_page_back(model: Qwen2, steps: int) -> None:
    decoder = make_decoder(model)
    decoder.admit(make_request("a", make_prompt(600), choices=2, max_tokens=100))
    for _ in range(steps):
        decoder.step()
    decoder.cancel("a")
    assert decoder.usage == 0
    assert not decoder.has_work
    assert decoder.num_prompts == 0


def test_too_little_memory_ends_the_prompt_that_came_last(
    model: Qwen2, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory for two pieces, simulated; the others go on as if they were alone."""
    launch = PortableStep.launch

    def small(self, rows, pieces=()):
        if len(pieces) > 2:
            raise torch.OutOfMemoryError("out of memory")
        return launch(self, rows, pieces)

    decoder = make_decoder(model)
    monkeypatch.setattr(PortableStep, "launch", small)
    for name, length in (("a", 17), ("b", 30), ("c", 31)):
        decoder.admit(make_request(name, make_prompt(length, seed=length)))
    outputs = run(decoder)
    [(ended, error)] = [each for each in outputs if isinstance(each[1], GenerationError)]
    assert ended == "c"
    assert isinstance(error, StepOutOfMemoryError)
    assert error.sequences == 3
    assert tokens(outputs, "a") == admitted_alone(model, 17)
    assert decoder.usage == 0


def test_a_damaged_prompt_fails_alone(model: Qwen2) -> None:
    decoder = make_decoder(model)
    decoder.admit(make_request("good", make_prompt(17, seed=17)))
    decoder.admit(make_request("bad", make_prompt(600)))
    outputs = decoder.step()
    page = int(decoder._reservations["bad"].held[0].pages[0])
    decoder._pool.memory[:, page] = torch.nan
    outputs += run(decoder)
    assert [name for name, each in outputs if isinstance(each, GenerationError)] == ["bad"]
    assert tokens(outputs, "good") == admitted_alone(model, 17)
    assert decoder.usage == 0


GROWING = (100, 120, 250, 127)


def growing(max_tokens: int = 40, choices: int = 1) -> list[GenerationRequest]:
    """Requests that all grow over the border of a page."""
    asked = {"max_tokens": max_tokens, "temperature": 1.0, "seed": 3, "choices": choices}
    return [make_request(f"r{n}", make_prompt(n, seed=n), **asked) for n in GROWING]


@pytest.fixture(scope="module")
def undisturbed(model: Qwen2) -> Callable[[int, int, KVCacheDtype], Said]:
    """What growing requests say where there is room for all; of each kind found out once."""

    @cache
    def of(max_tokens: int, choices: int, kept: KVCacheDtype) -> Said:
        decoder = make_decoder(model, pages=200, max_batch=8, kept=kept)
        for request in growing(max_tokens, choices):
            decoder.admit(request)
        outputs = run(decoder)
        assert decoder.num_preemptions == 0
        return {f"r{length}": tokens(outputs, f"r{length}") for length in GROWING}

    return of


class TestPagesAsTheyAreNeeded:
    """Fewer pages than requests need between them at their ends."""

    @pytest.mark.parametrize(
        ("choices", "pages", "max_tokens"),
        [(1, 6, 40), (1, 7, 40), (2, 9, 40), (2, 11, 40), (1, 9, 140)],
    )
    @pytest.mark.parametrize("kept", ["auto", "fp8_e4m3"])
    def test_whoever_makes_room_comes_back_with_the_same_text(
        self,
        model: Qwen2,
        undisturbed: Callable[[int, int, KVCacheDtype], Said],
        choices: int,
        pages: int,
        max_tokens: int,
        kept: KVCacheDtype,
    ) -> None:
        decoder = make_decoder(model, pages=pages, max_batch=8, kept=kept)
        waiting = growing(max_tokens, choices)
        outputs, most = [], 0
        while waiting or decoder.has_work:
            while waiting:
                try:
                    decoder.admit(waiting[0])
                except OutOfPagesError:
                    break
                waiting.pop(0)
            outputs += decoder.step()
            most = max(most, decoder.num_running)
        assert decoder.num_preemptions > 0
        assert most > choices
        for name, expected in undisturbed(max_tokens, choices, kept).items():
            assert tokens(outputs, name) == expected
        assert decoder.usage == 0

    def test_the_youngest_makes_room(self, model: Qwen2) -> None:
        decoder = make_decoder(model, pages=3, max_batch=8)
        decoder.admit(make_request("old", make_prompt(120), max_tokens=20))
        decoder.admit(make_request("young", make_prompt(120, 1), max_tokens=20))
        outputs = run(decoder)
        assert decoder.num_preemptions
        ends = [name for name, each in outputs if isinstance(each, Delta) and each.finish_reason]
        assert ends == ["old", "young"]

    def test_nobody_else_comes_before_those_that_made_room(self, model: Qwen2) -> None:
        decoder = make_decoder(model, pages=4, max_batch=8)
        decoder.admit(make_request("old", make_prompt(250), max_tokens=20))
        decoder.admit(make_request("young", make_prompt(250, 1), max_tokens=20))
        while not decoder.num_preemptions:
            decoder.step()
        assert decoder.num_waiting == 1
        for take in (decoder.admit, decoder.reserve):
            with pytest.raises(OutOfPagesError):
                take(make_request("new", make_prompt(3), max_tokens=1))
        decoder.cancel("old")
        run(decoder)
        decoder.admit(make_request("new", make_prompt(3), max_tokens=1))

    def test_reserved_pages_are_certain(self, folder: Path, model: Qwen2) -> None:
        prompt = make_prompt(300)
        expected = Engine(folder).generate("handed", prompt, max_tokens=60)
        decoder = make_decoder(model, pages=5, max_batch=8)
        decoder.admit(make_request("grows", make_prompt(250), max_tokens=30))
        engine = Engine(folder)
        engine.decoder = decoder
        decoder.reserve(make_request("handed", prompt, max_tokens=60))
        outputs = decoder.start("handed", engine.hand_off("handed", prompt))
        outputs += run(decoder)
        assert decoder.num_preemptions
        assert tokens(outputs, "handed") == expected
        assert len(tokens(outputs, "grows")[0]) == 30

    def test_a_step_without_pages_waits_for_those_that_are_reserved(self, model: Qwen2) -> None:
        """No work, rather than steps that find nothing to do, until pages are free."""
        decoder = make_decoder(model, pages=4)
        decoder.reserve(make_request("reserved", make_prompt(250), max_tokens=100))
        decoder.admit(make_request("grows", make_prompt(120), max_tokens=40))
        while decoder.has_work:
            decoder.step()
        assert decoder.num_preemptions == 1
        decoder.cancel("reserved")
        assert decoder.has_work
        assert len(tokens(run(decoder), "grows")[0]) > 25

    @pytest.mark.parametrize("steps", range(0, 48, 4))
    def test_cancelling_whoever_made_room_frees_what_it_holds(
        self, model: Qwen2, steps: int
    ) -> None:
        decoder = make_decoder(model, pages=6, max_batch=8)
        for request in growing():
            decoder.admit(request)
        for _ in range(steps):
            decoder.step()
        for length in GROWING:
            decoder.cancel(f"r{length}")
        assert decoder.usage == 0
        assert not decoder.has_work

    def test_a_prompt_under_way_makes_room_and_goes_on_where_it_was(self, model: Qwen2) -> None:
        limits = PromptLimits(longest=1024, at_once=128, pieces=4)
        expected = admitted_alone(model, 600)
        decoder = make_decoder(model, pages=6, limits=limits)
        decoder.admit(make_request("old", make_prompt(125), max_tokens=30))
        decoder.step()
        decoder.admit(make_request("r600", make_prompt(600, seed=600)))
        outputs = run(decoder)
        assert decoder.num_preemptions == 1
        done = [each.done for name, each in outputs if isinstance(each, Progress) and name != "old"]
        assert done == sorted(set(done))
        assert tokens(outputs, "r600") == expected


def parts_of(queue: PromptQueue, places: int = 8) -> list[tuple[str, int, int]]:
    parts = queue.deal(places, empty=False)
    for part in parts:
        queue.count(part)
    return [(part.request_id, part.start, part.end) for part in parts]


def test_short_prompts_pass_a_long_one_that_gets_what_is_left() -> None:
    queue = PromptQueue(PromptLimits(1024, 512, 8), patience=2.0)
    queue.add("long", 1000, 1)
    queue.add("short", 100, 1)
    queue.add("shorter", 30, 1)
    assert parts_of(queue) == [("shorter", 0, 30), ("short", 0, 100), ("long", 0, 256)]
    assert parts_of(queue) == [("long", 256, 768)]
    assert parts_of(queue) == [("long", 768, 1000)]
    assert len(queue) == 0


def test_a_long_prompt_is_not_passed_for_ever() -> None:
    queue = PromptQueue(PromptLimits(1024, 128, 8), patience=2.0)
    queue.add("long", 300, 1)
    for number in range(30):
        queue.add(f"s{number}", 128, 1)
    dealt = [parts_of(queue)[0][0] for _ in range(20)]
    assert dealt.count("long") == 3


def test_no_more_prompts_than_a_step_takes_or_have_places() -> None:
    queue = PromptQueue(PromptLimits(1024, 512, 3), patience=2.0)
    for number in range(5):
        queue.add(f"p{number}", 10, 2)
    assert queue.deal(8, empty=False) == [Part(f"p{n}", 0, 10) for n in range(3)]
    assert queue.deal(5, empty=False) == [Part(f"p{n}", 0, 10) for n in range(2)]
    assert queue.deal(1, empty=False) == []
    assert queue.deal(1, empty=True) == [Part("p0", 0, 10)]


def test_a_prompt_that_nobody_is_beside_comes_in_larger_pieces() -> None:
    queue = PromptQueue(PromptLimits(4096, at_once=128, pieces=8, alone=1100), patience=2.0)
    queue.add("a", 2000, 1)
    assert queue.deal(8, empty=True) == [Part("a", 0, 1024)]
    assert parts_of(queue) == [("a", 0, 128)]  # somebody generates
    queue.add("b", 100, 1)
    assert queue.deal(8, empty=True) == [Part("b", 0, 100)]  # and the next would be done in between
    queue.remove("b")
    sizes = []
    while len(queue):
        (part,) = queue.deal(8, empty=True)
        queue.count(part)
        sizes.append(part.end - part.start)
    assert sizes == [1024, 512, 256, 80]


@pytest.mark.parametrize(
    ("at_once", "alone", "sizes"),
    [
        (128, 0, [128]),
        (128, 255, [128]),
        (128, 256, [128, 256]),
        (1024, 8192, [1024, 2048, 4096, 8192]),
        (0, 0, [0]),
    ],
)
def test_sizes_alone_are_those_of_others_doubled(
    at_once: int, alone: int, sizes: list[int]
) -> None:
    assert PromptLimits(8192, at_once, alone=alone).sizes_alone == sizes


@pytest.mark.parametrize(("length", "done"), [(1000, [512, 768, 896, 1000]), (600, [512, 600])])
def test_larger_pieces_make_the_same_tokens(model: Qwen2, length: int, done: list[int]) -> None:
    limits = PromptLimits(longest=1024, at_once=128, pieces=4, alone=512)
    decoder = make_decoder(model, limits=limits)
    decoder.admit(make_request("a", make_prompt(length, seed=length), **SAMPLING))
    outputs = run(decoder)
    assert [each.done for _, each in outputs if isinstance(each, Progress)] == done
    assert tokens(outputs, "a") == admitted_alone(model, length, **SAMPLING)


def test_a_queue_knows_what_is_done() -> None:
    queue = PromptQueue(PromptLimits(1024, 128, 3), patience=2.0)
    queue.add("a", 300, 1)
    parts_of(queue)
    assert queue.done("a") == 128
    queue.remove("a")
    queue.add("a", 300, 1, done=128)
    assert parts_of(queue) == [("a", 128, 256)]
    with pytest.raises(InvalidRequestError):
        queue.add("a", 5, 1)
    assert np.all(["a" in queue, "b" not in queue])
