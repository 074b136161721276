"""The engine over a scripted vLLM: pages, choices, ends, and what leaves nothing behind."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from longreach.engine.decode.contract import Output
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.errors import (
    CacheTooSmallError,
    GenerationError,
    InvalidRequestError,
    OutOfPagesError,
    RefusedPagesError,
    TransferError,
)
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import Pages
from longreach.engine.messages import Delta, GenerationRequest, Progress, SamplingParameters
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.pocket import CHECKPOINT
from longreach.kernels.page_size import PAGE_TOKENS
from longreach.lab.pocket.tokenizer import build_tokenizer
from longreach.plugins.vllm_decode.decoder import VllmDecoder

from .scripted import HEADS, LAYERS, SIZE, ScriptedCore, names, spells

LONGEST = 1000
HELLO = spells("hello")
NO_LOGITS = np.zeros(320, dtype=np.float32)


class Subject:
    def __init__(
        self, says: Callable[[str, int], int] = HELLO, pages: int = 40, batch: int = 4
    ) -> None:
        self.core = ScriptedCore(pages, says)
        self.decoder = VllmDecoder(
            self.core, ModelConfig.from_folder(CHECKPOINT), TokenBytes(build_tokenizer()), batch,
            LONGEST,
        )  # fmt: skip

    def steps(self) -> list[Output]:
        outputs: list[Output] = []
        for _ in range(200):
            if not self.decoder.has_work:
                return outputs
            outputs += self.decoder.step()
        raise AssertionError("it never ends")

    def is_empty(self) -> bool:
        core = self.core
        return core.num_free == core.num_pages and not core.running and not core.shared


def request(name: str, tokens: int = 300, **sampling: Any) -> GenerationRequest:
    asked = SamplingParameters(**{"max_tokens": 16, "temperature": 0.0, **sampling})
    return GenerationRequest(name, np.arange(tokens, dtype=np.int32) % 250, asked, 0.0)


def texts(outputs: list[Output], name: str = "a") -> dict[int, str]:
    found: dict[int, str] = {}
    for each, output in outputs:
        if each == name and isinstance(output, Delta):
            found[output.choice] = found.get(output.choice, "") + output.text
    return found


def reasons(outputs: list[Output]) -> list[str]:
    deltas = [output for _, output in outputs if isinstance(output, Delta)]
    return [each.finish_reason for each in deltas if each.finish_reason is not None]


def pages_of(count: int, value: float) -> Pages:
    return Pages(torch.full((count, HEADS, 2, PAGE_TOKENS, SIZE), value))


def test_pages_go_where_vllm_has_blocks_for_them() -> None:
    subject = Subject()
    decoder = subject.decoder
    decoder.reserve(request("a"))
    assert decoder.has_work
    decoder.step()
    assert not decoder.has_work
    assert decoder.complete_tokens("a") == 0
    decoder.receive("a", Place(1, 1, 0), pages_of(2, 7.0))
    assert decoder.complete_tokens("a") == 0
    layer = decoder.pool.layer(1).values
    assert layer[[0, 1, 2]].mean((1, 2, 3, 4)).tolist() == [0, 7, 7]
    held = decoder.held("a", Place(1, 2, 1), 1, 1)
    assert held.numbers.tolist() == [2]
    assert held.read().values.unique().tolist() == [7.0]
    for number in range(LAYERS):
        decoder.receive("a", Place(number, 0, 0), pages_of(3, 1.0))
    assert decoder.complete_tokens("a") == 3 * PAGE_TOKENS
    assert decoder.start("a", NO_LOGITS) == []
    outputs = subject.steps()
    assert texts(outputs) == {0: "hello"}
    assert reasons(outputs) == ["stop"]
    assert subject.is_empty()


def test_pages_that_come_before_blocks_are_known_wait_for_them() -> None:
    subject = Subject()
    subject.core.pages_to_give = False
    subject.decoder.reserve(request("a"))
    subject.decoder.step()
    assert subject.decoder.has_work
    place, came = Place(0, 0, 0), threading.Event()

    def receive() -> None:
        subject.decoder.receive("a", place, pages_of(3, 2.0))
        came.set()

    thread = threading.Thread(target=receive)
    thread.start()
    assert not came.wait(0.1)
    subject.core.pages_to_give = True
    subject.decoder.step()
    thread.join(10)
    assert came.is_set()


def test_whoever_waits_for_blocks_hears_of_the_end() -> None:
    subject = Subject()
    subject.core.pages_to_give = False
    subject.decoder.reserve(request("a"))
    failed: list[BaseException] = []

    def receive() -> None:
        try:
            subject.decoder.receive("a", Place(0, 0, 0), pages_of(1, 2.0))
        except TransferError as error:
            failed.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    subject.decoder.cancel("a")
    thread.join(10)
    assert len(failed) == 1
    assert subject.is_empty()


def test_pages_of_another_shape_are_refused() -> None:
    subject = Subject()
    subject.decoder.reserve(request("a"))
    subject.decoder.step()
    wrong = Pages(torch.zeros(1, HEADS, 2, PAGE_TOKENS, SIZE + 1))
    with pytest.raises(RefusedPagesError):
        subject.decoder.receive("a", Place(0, 0, 0), wrong)
    with pytest.raises(TransferError):
        subject.decoder.held("a", Place(0, 2, 0), 2, HEADS)


def test_what_was_promised_is_there_for_whoever_was_promised_it() -> None:
    """The first may take 3 + 1 pages of 8, and has none yet; the next one waits."""
    subject = Subject(pages=8)
    decoder = subject.decoder
    decoder.reserve(request("a", 300, max_tokens=200))
    with pytest.raises(OutOfPagesError) as refused:
        decoder.reserve(request("b", 400, max_tokens=200))
    assert refused.value.free == 4
    decoder.step()
    assert subject.core.num_free == 5
    with pytest.raises(OutOfPagesError):
        decoder.reserve(request("b", 400, max_tokens=200))
    decoder.start("a", NO_LOGITS)
    subject.steps()
    decoder.reserve(request("b", 400, max_tokens=200))
    decoder.cancel("b")
    assert subject.is_empty()
    with pytest.raises(CacheTooSmallError):
        decoder.check(request("c", 1000, max_tokens=30))


@pytest.mark.parametrize(("tokens", "most"), [(300, 2 + 3 * 2), (384, 2 + 3 * 2), (385, 3 + 3)])
def test_choices_share_all_but_the_page_of_the_prompts_last_token(tokens: int, most: int) -> None:
    subject = Subject(spells("one", "two", "three"), pages=most)
    asked = request("a", tokens, choices=3, max_tokens=127)
    subject.decoder.reserve(asked)
    subject.decoder.step()
    assert names(subject.core.added) == ["a/0"]
    subject.decoder.start("a", NO_LOGITS)
    outputs = subject.steps()
    assert texts(outputs) == {0: "one", 1: "two", 2: "three"}
    assert [each.handed_off for each in subject.core.added] == [True, False, False]
    assert {each.family for each in subject.core.added} == {"a"}
    assert len({each.seed for each in subject.core.added}) == 3
    assert subject.is_empty()
    with pytest.raises(CacheTooSmallError):
        subject.decoder.check(request("a", tokens, choices=3, max_tokens=127 + 128))


def test_the_first_choice_may_end_before_the_others_have_begun() -> None:
    subject = Subject(spells("", "later"), batch=1)
    subject.decoder.reserve(request("a", choices=2))
    subject.decoder.step()
    subject.decoder.start("a", NO_LOGITS)
    outputs = subject.steps()
    assert texts(outputs) == {0: "", 1: "later"}
    assert subject.is_empty()


def test_a_prompt_of_its_own_is_told_of_as_it_is_computed() -> None:
    subject = Subject()
    subject.decoder.admit(request("a", 600))
    assert subject.decoder.num_prompts == 1
    outputs = subject.steps()
    progress = [output for _, output in outputs if isinstance(output, Progress)]
    assert progress == [Progress(256, 600), Progress(512, 600), Progress(600, 600)]
    assert texts(outputs) == {0: "hello"}
    assert subject.decoder.num_prompts == 0
    assert subject.is_empty()


@pytest.mark.parametrize("changes", [{"tokens": LONGEST + 1}, {"prompt_logprobs": 1}])
def test_what_vllm_does_not_compute_is_refused(changes: dict[str, Any]) -> None:
    subject = Subject()
    with pytest.raises(InvalidRequestError):
        subject.decoder.admit(request("a", **changes))
    assert not subject.decoder.has_work


def test_no_more_run_at_a_time_than_fit_into_a_batch() -> None:
    subject = Subject(batch=2)
    for name in "abc":
        subject.decoder.admit(request(name, 100))
    outputs = subject.decoder.step()
    assert names(subject.core.added) == ["a/0", "b/0"]
    assert subject.decoder.num_waiting == 1
    outputs += subject.steps()
    assert [texts(outputs, name)[0] for name in "abc"] == ["hello"] * 3
    assert subject.is_empty()


def test_a_stop_string_ends_what_vllm_would_go_on_with() -> None:
    subject = Subject(spells("well, hello there"))
    subject.decoder.admit(request("a", 100, stop=("hello",), max_tokens=40))
    outputs = subject.steps()
    assert texts(outputs) == {0: "well, "}
    assert reasons(outputs) == ["stop"]
    assert subject.core.aborted == ["a/0"]
    assert subject.is_empty()


def test_an_answer_of_its_longest_length_has_ended_by_that() -> None:
    subject = Subject()
    subject.decoder.admit(request("a", 100, max_tokens=3))
    outputs = subject.steps()
    assert texts(outputs) == {0: "hel"}
    assert reasons(outputs) == ["length"]


def test_an_answer_is_held_to_its_grammar_and_ends_with_it() -> None:
    subject = Subject(spells("abc and so on"))
    asked = request("a", 100, grammar='start: "abc"')
    constraint = subject.decoder.prepare(asked)
    subject.decoder.admit(asked, constraint)
    [sequence] = subject.core.added or [subject.decoder._taken["a"].choices[0].sequence]
    assert sequence.held_to is not None
    outputs = subject.steps()
    assert texts(outputs) == {0: "abc"}
    assert reasons(outputs) == ["stop"]
    assert subject.is_empty()


def test_a_grammar_that_fails_ends_its_request_and_no_other() -> None:
    subject = Subject(spells("xyz"))
    asked = request("a", 100, grammar='start: "abc"')
    subject.decoder.admit(asked, subject.decoder.prepare(asked))
    subject.decoder.admit(request("b", 100))
    outputs = subject.steps()
    assert [type(output) for name, output in outputs if name == "a"][-1] is not Delta
    assert any(name == "a" and isinstance(output, GenerationError) for name, output in outputs)
    assert texts(outputs, "b") == {0: "xyz"}
    assert subject.is_empty()


def test_what_a_client_has_is_generated_again_in_silence() -> None:
    subject = Subject(spells("hello"))
    asked = request("a", 100)
    again = GenerationRequest(
        "a", asked.prompt, asked.sampling, 0.0, replayed=(tuple(b"hel"),)
    )  # fmt: skip
    subject.decoder.admit(again)
    sequence = subject.decoder._taken["a"].choices[0].sequence
    held_to = sequence.held_to
    assert held_to is not None
    mask = np.zeros(10, dtype=np.uint32)
    held_to.fill(mask)
    bits = np.unpackbits(mask.view(np.uint8), bitorder="little")
    assert np.flatnonzero(bits).tolist() == [ord("h")]
    outputs = subject.steps()
    assert texts(outputs) == {0: "lo"}
    assert held_to.is_open
    assert subject.is_empty()


def test_whatever_vllm_gives_up_is_told() -> None:
    subject = Subject()
    subject.core.failing.add("a/0")
    subject.decoder.admit(request("a", 100))
    subject.decoder.admit(request("b", 100))
    outputs = subject.steps()
    assert [type(output) for name, output in outputs if name == "a"] == [GenerationError]
    assert texts(outputs, "b") == {0: "hello"}
    assert subject.is_empty()


@pytest.mark.parametrize("steps", range(6))
@pytest.mark.parametrize("choices", [1, 3])
def test_whoever_leaves_leaves_nothing_behind(steps: int, choices: int) -> None:
    subject = Subject(batch=2)
    decoder = subject.decoder
    decoder.reserve(request("a", choices=choices))
    for number in range(steps):
        if number == 2:
            decoder.start("a", NO_LOGITS)
        decoder.step()
    decoder.cancel("a")
    decoder.cancel("a")
    assert subject.steps() == []
    assert subject.is_empty()
    assert not decoder.is_generating("a")
    assert decoder.usage == 0.0
    decoder.admit(request("b", 100))
    assert texts(subject.steps(), "b") == {0: "hello"}


def test_a_request_starts_once() -> None:
    subject = Subject()
    with pytest.raises(InvalidRequestError):
        subject.decoder.start("a", NO_LOGITS)
    subject.decoder.reserve(request("a"))
    with pytest.raises(InvalidRequestError):
        subject.decoder.reserve(request("a"))
    subject.decoder.step()
    subject.decoder.start("a", NO_LOGITS)
    with pytest.raises(InvalidRequestError):
        subject.decoder.start("a", NO_LOGITS)
    with pytest.raises(TransferError):
        subject.decoder.receive("a", Place(0, 0, 0), pages_of(1, 1.0))


def test_what_a_choice_left_to_the_others_is_not_counted_again() -> None:
    """The first one ends with its first token, and the others have no page of their own yet."""
    subject = Subject(spells("", "hello"), pages=16, batch=1)
    subject.decoder.reserve(request("a", tokens=1000, choices=2))
    subject.decoder.step()
    subject.decoder.start("a", NO_LOGITS)
    subject.decoder.step()
    assert list(subject.core.shared) == ["a/0"]
    assert names(subject.core.added) == ["a/0"]
    # Of 16 pages it keeps 7 for the second, which takes 1 more: 8 are left.
    with pytest.raises(OutOfPagesError) as raised:
        subject.decoder.reserve(request("b", tokens=1020, max_tokens=5))
    assert (raised.value.needed, raised.value.free) == (9, 8)
    subject.decoder.reserve(request("b", tokens=1000))
    subject.steps()
    subject.decoder.start("b", NO_LOGITS)
    assert texts(subject.steps(), "b") == {0: ""}
    assert subject.is_empty()
