"""Continuous batching against one-shot prefill, transformers, and each request alone."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.sampler import Sampler
from longreach.engine.decode.sequences import pages_needed
from longreach.engine.errors import (
    CacheTooSmallError,
    GenerationError,
    InvalidRequestError,
    OutOfMemoryError,
    OutOfPagesError,
    PageFormatError,
    ReceiveOutOfMemoryError,
    RefusedPagesError,
    StartOutOfMemoryError,
    StepOutOfMemoryError,
    TransferError,
)
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import PagePool, Pages
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters
from longreach.engine.prefill.prefiller import Prefiller
from longreach.kernels import dual_chunk
from longreach.lab.pocket.tokenizer import build_tokenizer

from ..checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint

POOL_PAGES = 40


@pytest.fixture(scope="module")
def dual_chunk_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dual"), dual_chunk=DUAL_CHUNK)


class Engine:
    """A prefiller and a decoder with pools of their own, filled with NaN."""

    def __init__(
        self,
        folder: Path,
        pages: int = POOL_PAGES,
        max_batch: int = 4,
        kept: KVCacheDtype = "auto",
    ) -> None:
        self.prefill = LocalPrefill(folder, max_tokens=4096, kv_cache_dtype=kept)
        self.pool = PagePool(self.prefill.pool.geometry, pages, torch.device("cpu"))
        self.pool.memory.fill_(torch.nan)
        if self.pool.scales is not None:
            self.pool.scales.fill_(torch.nan)
        self.decoder = Decoder(
            self.prefill.model, self.pool, TokenBytes(build_tokenizer()), max_batch
        )

    def reserve(self, name: str, prompt: list[int], **sampling) -> None:
        self.decoder.reserve(make_request(name, prompt, **sampling))

    def hand_off(self, name: str, prompt: list[int]) -> np.ndarray:
        """Prefill a reserved request in chunks of 256 into the decoder; its logits."""
        prefiller = self.prefill.prefiller
        prefiller.admit(name, np.array(prompt, dtype=np.int32))
        sender = DirectHandOff(self.decoder, name)
        result = None
        for start in range(0, len(prompt), 256):
            result = prefiller.run_chunk(name, start, min(start + 256, len(prompt)), sender)
        prefiller.release(name)
        assert result is not None
        assert result.logits is not None
        return result.logits.numpy()

    def generate(self, name: str, prompt: list[int], **sampling) -> dict[int, list[int]]:
        """Token ids of each choice of one request, alone."""
        self.reserve(name, prompt, **sampling)
        outputs = self.decoder.start(name, self.hand_off(name, prompt))
        while self.decoder.has_work:
            outputs += self.decoder.step()
        return tokens_by_choice(outputs, name)


def outputs_of(engine: Engine, request: GenerationRequest) -> list[Delta]:
    """What comes out for one request, alone, to its end."""
    prompt = request.prompt.tolist()
    engine.decoder.reserve(request)
    outputs = engine.decoder.start(request.request_id, engine.hand_off(request.request_id, prompt))
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    assert engine.decoder.usage == 0
    deltas = [delta for _, delta in outputs if isinstance(delta, Delta)]
    assert len(deltas) == len(outputs)
    return deltas


def make_request(name: str, prompt: list[int], **sampling) -> GenerationRequest:
    values = {"max_tokens": 8, "temperature": 0.0, "ignore_eos": True, **sampling}
    prompt_ids = np.array(prompt, dtype=np.int32)
    return GenerationRequest(name, prompt_ids, SamplingParameters(**values), arrived=0.0)


def pages_of(engine: Engine, count: int) -> Pages:
    return Pages(engine.pool.memory[0, :count].clone())


def make_prompt(length: int, seed: int = 0) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB - 1, length).tolist()


def tokens_by_choice(outputs, name: str) -> dict[int, list[int]]:
    choices: dict[int, list[int]] = {}
    for request_id, delta in outputs:
        if request_id == name:
            assert isinstance(delta, Delta)
            choices.setdefault(delta.choice, []).extend(t.token_id for t in delta.tokens)
    return choices


@pytest.mark.parametrize("length", [1, 127, 128, 300])
def test_greedy_equals_transformers(tmp_path: Path, length: int) -> None:
    folder = make_checkpoint(tmp_path)
    prompt = make_prompt(length)
    generated = Engine(folder).generate("a", prompt, max_tokens=12)[0]
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = list(prompt)
    with torch.inference_mode():
        for _ in range(12):
            text.append(int(model(torch.tensor([text])).logits[0, -1].argmax()))
    assert generated == text[length:]


@pytest.mark.parametrize("length", [100, 245, 369, 600])
def test_decode_equals_one_shot_prefill_under_dual_chunks(
    dual_chunk_folder: Path, length: int
) -> None:
    """Every step must choose what prefilling the text so far chooses; chunks end within it."""
    prompt = make_prompt(length, seed=length)
    engine = Engine(dual_chunk_folder)
    generated = engine.generate("a", prompt, max_tokens=10)[0]
    for count, token in enumerate(generated):
        text = np.array(prompt + generated[:count], dtype=np.int32)
        assert int(engine.prefill.logits(text).argmax()) == token


@pytest.mark.parametrize("length", [100, 250, 600])
def test_pages_of_8_bits_that_grow_hold_what_whole_ones_do(tmp_path: Path, length: int) -> None:
    """Token by token, and from page to page, in two choices that share pages.

    Positions are plain: temperature would grow in decode, and be the last length's in prefill.
    """
    engine, prompt = Engine(make_checkpoint(tmp_path), kept="fp8_e4m3"), make_prompt(length)
    engine.reserve("a", prompt, max_tokens=40, choices=2)
    outputs = engine.decoder.start("a", engine.hand_off("a", prompt))
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    generated = tokens_by_choice(outputs, "a")
    assert generated[0] == generated[1]
    deltas = [delta for _, delta in outputs if isinstance(delta, Delta) and delta.choice == 1]
    for count, delta in enumerate(deltas):
        text = np.array(prompt + generated[1][:count], dtype=np.int32)
        logprobs = engine.prefill.logits(text).log_softmax(0)
        assert int(logprobs.argmax()) == delta.tokens[0].token_id
        assert delta.tokens[0].logprob == pytest.approx(float(logprobs.max()), abs=1e-4)


def test_pages_of_another_format_are_refused(dual_chunk_folder: Path) -> None:
    prompt = make_prompt(200)
    engine = Engine(dual_chunk_folder)
    engine.prefill = LocalPrefill(dual_chunk_folder, 1024, kv_cache_dtype="fp8_e4m3")
    engine.reserve("a", prompt)
    with pytest.raises(RefusedPagesError) as refused:
        engine.hand_off("a", prompt)
    assert refused.value.request_id == "a"
    assert isinstance(refused.value.reason, PageFormatError)
    assert vars(refused.value.reason) == {"came": "float8_e4m3fn", "kept": "float32"}


def test_an_answer_does_not_depend_on_what_else_is_in_the_batch(dual_chunk_folder: Path) -> None:
    prompts = {f"r{i}": make_prompt(50 + 97 * i, seed=i) for i in range(5)}
    sampling = {"temperature": 1.0, "seed": 7, "max_tokens": 9, "choices": 2}
    alone = {
        name: Engine(dual_chunk_folder).generate(name, prompt, **sampling)
        for name, prompt in prompts.items()
    }
    engine = Engine(dual_chunk_folder, max_batch=4)
    outputs = []
    for name, prompt in prompts.items():
        engine.reserve(name, prompt, **sampling)
        outputs += engine.decoder.start(name, engine.hand_off(name, prompt))
        outputs += engine.decoder.step()  # so that every request joins at another time
    while engine.decoder.has_work:
        assert engine.decoder.num_running <= 4
        outputs += engine.decoder.step()
    for name in prompts:
        assert tokens_by_choice(outputs, name) == alone[name]
    assert alone["r0"][0] != alone["r0"][1]
    assert engine.decoder.usage == 0


def test_a_prefiller_on_the_same_pool_writes_where_decode_reads(dual_chunk_folder: Path) -> None:
    prompt = make_prompt(300)
    engine = Engine(dual_chunk_folder)
    expected = engine.generate("apart", prompt)[0]
    prefiller = Prefiller(engine.prefill.model, engine.pool, None)
    with pytest.raises(InvalidRequestError):
        engine.decoder.block_table("shared")
    engine.reserve("shared", prompt)
    free = engine.pool.num_free
    prefiller.admit(
        "shared", np.array(prompt, dtype=np.int32), engine.decoder.block_table("shared")
    )
    prefiller.run_chunk("shared", 0, 128)
    logits = prefiller.run_chunk("shared", 128, 300).logits
    assert logits is not None
    prefiller.release("shared")
    assert engine.pool.num_free == free
    outputs = engine.decoder.start("shared", logits.numpy())
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    assert tokens_by_choice(outputs, "shared")[0] == expected
    assert engine.pool.num_free == POOL_PAGES


def test_prefill_goes_on_where_pages_are_filled_already(dual_chunk_folder: Path) -> None:
    prompt = np.array(make_prompt(300), dtype=np.int32)
    engine = Engine(dual_chunk_folder)
    expected = engine.prefill.logits(prompt)
    engine.reserve("a", prompt.tolist())
    pages = engine.decoder.block_table("a")
    first = Prefiller(engine.prefill.model, engine.pool, None)
    first.admit("a", prompt, pages)
    first.run_chunk("a", 0, 128)
    second = Prefiller(engine.prefill.model, engine.pool, None)
    second.admit("a", prompt, pages, done=128)
    first.release("a")
    free = engine.pool.num_free
    for held, done in ((pages, 100), (pages, -128), (pages, 384), (pages[:2], 128)):
        with pytest.raises(InvalidRequestError):
            second.admit("b", prompt, held, done=done)
    assert engine.pool.num_free == free
    logits = second.run_chunk("a", 128, 300).logits
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_ends_at_end_token_stop_string_and_length(dual_chunk_folder: Path) -> None:
    engine = Engine(dual_chunk_folder)
    prompt = make_prompt(40)
    free = engine.generate("free", prompt, max_tokens=6)[0]
    engine.reserve("stopped", prompt, max_tokens=6, stop_token_ids=(free[2],))
    engine.reserve("text", prompt, max_tokens=6, stop=(chr(free[3]),))
    for name in ("stopped", "text"):
        outputs = engine.decoder.start(name, engine.hand_off(name, prompt))
        while engine.decoder.has_work:
            outputs += engine.decoder.step()
        deltas = [delta for _, delta in outputs if isinstance(delta, Delta)]
        assert deltas[-1].finish_reason == "stop"
        text = "".join(delta.text for delta in deltas)
        end = free.index(free[2]) if name == "stopped" else free.index(free[3])
        assert text.encode() == bytes(free[:end])


def test_nothing_ends_an_answer_before_min_tokens(dual_chunk_folder: Path) -> None:
    engine = Engine(dual_chunk_folder)
    prompt = make_prompt(40)
    free = engine.generate("free", prompt, max_tokens=6)[0]
    stops = {"stop_token_ids": tuple(free), "stop": tuple(map(chr, range(256)))}
    ended = engine.generate("ended", prompt, max_tokens=6, **stops)[0]
    kept = engine.generate("kept", prompt, max_tokens=6, min_tokens=4, **stops)[0]
    assert (len(ended), len(kept)) == (1, 5)
    assert not set(kept[:4]) & set(free)


def test_one_damaged_request_fails_alone(dual_chunk_folder: Path) -> None:
    engine = Engine(dual_chunk_folder)
    prompts = {"good": make_prompt(30), "bad": make_prompt(31, seed=1)}
    alone = Engine(dual_chunk_folder).generate("good", prompts["good"])
    outputs = []
    for name, prompt in prompts.items():
        engine.reserve(name, prompt)
        outputs += engine.decoder.start(name, engine.hand_off(name, prompt))
    table = engine.decoder._reservations["bad"].block_tables[0]
    engine.pool.memory[:, int(table.pages[0])] = torch.nan
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    assert tokens_by_choice(outputs, "good") == alone
    [error] = [output for _, output in outputs if isinstance(output, GenerationError)]
    assert "not finite" in str(error)
    assert engine.decoder.usage == 0


WITHOUT_MEMORY = pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("as the allocator says it"),
        torch.AcceleratorError("CUDA error: out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
    ids=["allocator", "device", "cublas"],
)


@WITHOUT_MEMORY
def test_too_little_memory_for_a_step_ends_the_request_that_joined_last(
    dual_chunk_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    """Memory for two sequences, simulated; the first request must go on as if it were alone."""
    engine = Engine(dual_chunk_folder)
    prompts = {"first": make_prompt(30), "last": make_prompt(31, seed=1)}
    alone = Engine(dual_chunk_folder).generate("first", prompts["first"])
    kernel, calls = dual_chunk.decode_attention, 0

    def small_kernel(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if engine.decoder.num_running > 2 and calls % 2:
            raise error
        return kernel(*arguments)

    monkeypatch.setattr(dual_chunk, "decode_attention", small_kernel)
    outputs = []
    for name, prompt in prompts.items():
        engine.reserve(name, prompt, choices=2 if name == "last" else 1)
        outputs += engine.decoder.start(name, engine.hand_off(name, prompt))
        outputs += engine.decoder.step()
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    assert tokens_by_choice(outputs, "first") == alone
    [ended] = [output for name, output in outputs if isinstance(output, OutOfMemoryError)]
    assert isinstance(ended, StepOutOfMemoryError)
    assert ended.sequences == 3
    assert engine.decoder.usage == 0
    assert engine.generate("last", prompts["last"])


def test_too_little_memory_for_pages_that_come_ends_that_hand_off(
    dual_chunk_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine, prompt = Engine(dual_chunk_folder), make_prompt(300)
    alone = Engine(dual_chunk_folder).generate("a", prompt)
    put, calls = engine.pool.put, 0

    def small_put(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise torch.OutOfMemoryError("out of memory")
        put(*arguments)

    monkeypatch.setattr(engine.pool, "put", small_put)
    engine.reserve("a", prompt)
    with pytest.raises(ReceiveOutOfMemoryError) as raised:
        engine.hand_off("a", prompt)
    assert raised.value.request_id == "a"
    engine.prefill.prefiller.release("a")
    engine.decoder.cancel("a")
    assert engine.decoder.usage == 0
    assert engine.generate("a", prompt) == alone


@WITHOUT_MEMORY
def test_too_little_memory_to_start_ends_that_request(
    dual_chunk_folder: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    engine, prompt = Engine(dual_chunk_folder), make_prompt(300)
    alone = Engine(dual_chunk_folder).generate("a", prompt, choices=2)

    def fail(*arguments: object) -> None:
        raise error

    engine.reserve("a", prompt, choices=2)
    logits = engine.hand_off("a", prompt)
    with monkeypatch.context() as patch:
        patch.setattr(engine.pool, "copy_page", fail)
        [(name, ended)] = engine.decoder.start("a", logits)
    assert name == "a"
    assert isinstance(ended, StartOutOfMemoryError)
    assert ended.choices == 2
    assert not engine.decoder.is_generating("a")
    assert engine.decoder.usage == 0
    assert engine.generate("a", prompt, choices=2) == alone


@pytest.mark.parametrize("when", ["reserved", "part received", "waiting", "running"])
def test_cancelling_gives_every_page_back(dual_chunk_folder: Path, when: str) -> None:
    engine = Engine(dual_chunk_folder)
    prompt = make_prompt(300)
    engine.reserve("a", prompt, choices=3)
    if when == "part received":
        engine.decoder.receive("a", Place(0, 0, 0), pages_of(engine, 1))
    if when in ("waiting", "running"):
        engine.decoder.start("a", engine.hand_off("a", prompt))
    if when == "running":
        engine.decoder.step()
    engine.decoder.cancel("a")
    engine.decoder.cancel("a")
    assert engine.decoder.usage == 0
    assert not engine.decoder.has_work
    with pytest.raises(TransferError):
        engine.decoder.receive("a", Place(0, 0, 0), pages_of(engine, 1))


@pytest.mark.parametrize("where", ["copy_page", "sampler"])
def test_a_start_that_fails_half_way_keeps_no_page(
    dual_chunk_folder: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    engine = Engine(dual_chunk_folder)
    prompt = make_prompt(300)
    engine.reserve("a", prompt, choices=3)
    logits = engine.hand_off("a", prompt)

    def fail(*arguments: object) -> None:
        raise RuntimeError("broken")

    target, name = (engine.pool, where) if where == "copy_page" else (Sampler, "choose")
    monkeypatch.setattr(target, name, fail)
    with pytest.raises(RuntimeError):
        engine.decoder.start("a", logits)
    engine.decoder.cancel("a")
    assert engine.decoder.usage == 0
    assert not engine.decoder.has_work


def test_what_cannot_be_served_is_refused_and_takes_nothing(dual_chunk_folder: Path) -> None:
    engine = Engine(dual_chunk_folder, pages=4)
    with pytest.raises(CacheTooSmallError) as refused:
        engine.reserve("long", make_prompt(600))
    assert vars(refused.value) == {"phase": "decode", "needed": 640, "total": 512}
    engine.reserve("a", make_prompt(300))
    with pytest.raises(OutOfPagesError):
        engine.reserve("b", make_prompt(200))
    with pytest.raises(InvalidRequestError):
        engine.reserve("a", make_prompt(10))
    with pytest.raises(TransferError):
        engine.decoder.receive("a", Place(0, 2, 0), pages_of(engine, 2))
    with pytest.raises(InvalidRequestError):
        engine.decoder.start("b", np.zeros(VOCAB, dtype=np.float32))
    engine.decoder.cancel("a")
    assert engine.decoder.usage == 0


def test_choices_share_the_pages_that_the_prompt_fills() -> None:
    request = make_request("a", make_prompt(300), choices=3, max_tokens=100)
    assert pages_needed(request) == 2 + 3 * 2


def test_a_first_token_comes_with_a_place_in_the_batch_and_not_before(
    dual_chunk_folder: Path,
) -> None:
    """Else a client would see one token, and then nothing for as long as others generate."""
    engine = Engine(dual_chunk_folder, max_batch=1)
    sampling = {"max_tokens": 3, "temperature": 0.0, "ignore_eos": True}
    prompts = {name: make_prompt(50, seed) for seed, name in enumerate(("first", "second"))}
    for name, prompt in prompts.items():
        engine.reserve(name, prompt, **sampling)
    decoder = engine.decoder
    outputs = decoder.start("first", engine.hand_off("first", prompts["first"]))
    assert [name for name, _ in outputs] == ["first"]
    assert decoder.start("second", engine.hand_off("second", prompts["second"])) == []
    assert (decoder.num_running, decoder.num_waiting, decoder.num_generating) == (1, 1, 2)
    while decoder.has_work:
        outputs += decoder.step()
    assert [name for name, _ in outputs] == ["first"] * 3 + ["second"] * 3
    for name, prompt in prompts.items():
        alone = Engine(dual_chunk_folder).generate(name, prompt, **sampling)
        assert tokens_by_choice(outputs, name) == alone


SAMPLED = {"temperature": 0.9, "top_p": 0.9, "seed": 3, "frequency_penalty": 0.5}


@pytest.mark.parametrize("sampling", [{}, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("had", [(0, 0), (1, 5), (11, 2), (12, 12)])
def test_a_request_that_is_begun_again_says_the_rest_of_what_it_would_have_said(
    dual_chunk_folder: Path, sampling: dict[str, Any], had: tuple[int, int]
) -> None:
    engine, prompt = Engine(dual_chunk_folder), make_prompt(245)
    request = make_request("a", prompt, max_tokens=12, choices=2, **sampling)
    whole: list[list[Delta]] = [[], []]
    for delta in outputs_of(engine, request):
        whole[delta.choice].append(delta)
    tokens = [tuple(delta.tokens[0].token_id for delta in deltas) for deltas in whole]
    replayed = tuple(tokens[choice][: had[choice]] for choice in (0, 1))
    rest: list[list[Delta]] = [[], []]
    for delta in outputs_of(engine, replace(request, request_id="again", replayed=replayed)):
        rest[delta.choice].append(delta)
    for choice in (0, 1):
        left = whole[choice][had[choice] :]
        # A choice that had ended says so once more, and nothing else.
        assert rest[choice] == (left or [Delta(choice, "", (), "length")])


def test_what_is_replayed_is_what_was_said_whatever_the_logits_say(dual_chunk_folder: Path) -> None:
    """An engine of another kind may have said it; what follows is built on it all the same."""
    engine, prompt = Engine(dual_chunk_folder), make_prompt(200)
    said = (7, 11, 13)
    request = make_request("a", prompt, max_tokens=8)
    deltas = outputs_of(engine, replace(request, replayed=(said,)))
    continued = engine.generate("b", [*prompt, *said], max_tokens=5)[0]
    assert [delta.tokens[0].token_id for delta in deltas] == continued
