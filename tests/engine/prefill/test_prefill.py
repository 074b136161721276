"""Prefill against transformers, against the definition, and against itself cut differently."""

import time
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import Qwen2ForCausalLM

from longreach.engine.errors import (
    CacheTooSmallError,
    ChunkOutOfMemoryError,
    InvalidRequestError,
    OutOfMemoryError,
    OutOfPagesError,
)
from longreach.engine.local import LocalPrefill
from longreach.engine.messages import Tokens
from longreach.engine.milestones import Milestone
from longreach.engine.model.layer import Layer
from longreach.engine.prefill import chunk
from longreach.kernels import elementwise, sparse
from longreach.kernels.sparse import portable_sums
from longreach.kernels.sparse.scores import PartSums

from ..checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint, oracle_logits

formats = pytest.mark.parametrize("kept", ["auto", "bfloat16", "fp8_e4m3"])


def prompt_of(length: int) -> Tokens:
    return np.random.default_rng(length).integers(0, VOCAB, length).astype(np.int32)


@pytest.fixture(scope="module")
def dual_chunk(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dual"), DUAL_CHUNK)


def engine(folder: Path, **options) -> LocalPrefill:
    local = LocalPrefill(folder, 1280, **options)
    local.pool.memory.fill_(torch.nan)
    if local.pool.scales is not None:
        local.pool.scales.fill_(torch.nan)
    return local


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("dual", [True, False])
def test_within_one_dual_chunk_it_is_transformers_qwen2(tmp_path, tie: bool, dual: bool) -> None:
    folder = make_checkpoint(tmp_path, DUAL_CHUNK if dual else None, tie=tie)
    prompt = prompt_of(111)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model(torch.from_numpy(prompt).long()[None]).logits[0, -1]
    torch.testing.assert_close(engine(folder).logits(prompt), expected, rtol=1e-4, atol=1e-4)


def test_plain_positions_far_out(tmp_path) -> None:
    folder = make_checkpoint(tmp_path)
    prompt = prompt_of(1000)
    model = Qwen2ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    expected = model(torch.from_numpy(prompt).long()[None]).logits[0, -1]
    actual = engine(folder).logits(prompt, chunk_tokens=384)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("length", [1, 63, 128, 246, 247, 500, 1000])
def test_dual_chunks_are_the_definition(dual_chunk: Path, length: int) -> None:
    prompt = prompt_of(length)
    expected = oracle_logits(dual_chunk, prompt.tolist())[-1].float()
    torch.testing.assert_close(engine(dual_chunk).logits(prompt), expected, rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize("chunk_tokens", [128, 256, 384, 640, 1024])
def test_every_chunk_size_is_the_same(dual_chunk: Path, chunk_tokens: int) -> None:
    prompt = prompt_of(1000)
    expected = oracle_logits(dual_chunk, prompt.tolist())[-1].float()
    actual = engine(dual_chunk).logits(prompt, chunk_tokens)
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


@formats
@pytest.mark.parametrize("chunk_tokens", [128, 1024])
def test_sparse_with_full_budgets_is_dense(tmp_path, chunk_tokens: int, kept: str) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    folder = make_checkpoint(tmp_path, keys, sparse=(4096, 4096))
    prompt = prompt_of(1000)
    dense = engine(folder, sparse=False, kv_cache_dtype=kept).logits(prompt)
    sparse = engine(folder, kv_cache_dtype=kept).logits(prompt, chunk_tokens)
    torch.testing.assert_close(sparse, dense, rtol=2e-4, atol=2e-4)


def test_small_budgets_really_leave_something_out(tmp_path) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 999}
    folder = make_checkpoint(tmp_path, keys, sparse=(40, 128))
    sparse, dense = engine(folder), engine(folder, sparse=False)
    assert not torch.allclose(sparse.logits(prompt_of(1000)), dense.logits(prompt_of(1000)))
    torch.testing.assert_close(sparse.logits(prompt_of(999)), dense.logits(prompt_of(999)))


def test_nothing_is_scored_where_budgets_leave_no_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    folder = make_checkpoint(tmp_path, keys, sparse=(30, 128))
    prompt = prompt_of(1000)
    with monkeypatch.context() as patched:
        patched.setattr(sparse, "leave_no_choice", lambda _: False)
        expected = engine(folder).logits(prompt, 384)
    monkeypatch.delattr(sparse, "key_scores")
    assert engine(folder).logits(prompt, 384).equal(expected)


@pytest.mark.parametrize("slashes", [128, 256])
def test_bands_are_summed_only_where_some_are_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, slashes: int
) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    folder = make_checkpoint(tmp_path, keys, sparse=(40, slashes))
    prompt, asked = prompt_of(1000), []
    summed = portable_sums.KeyScores.sums

    def all_of_them(scores: portable_sums.KeyScores, every: torch.Tensor, bands: bool) -> PartSums:
        asked.append(bands)
        return summed(scores, every)

    with monkeypatch.context() as patched:
        patched.setattr(portable_sums.KeyScores, "sums", all_of_them)
        expected = engine(folder).logits(prompt, 384)
    assert set(asked) == {slashes > 128}
    assert engine(folder).logits(prompt, 384).equal(expected)


def test_bfloat16_is_near(dual_chunk: Path) -> None:
    prompt = prompt_of(500)
    expected = engine(dual_chunk).logits(prompt)
    actual = engine(dual_chunk, dtype=torch.bfloat16).logits(prompt)
    assert (actual - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("chunk_tokens", [384, 1280])
@pytest.mark.parametrize("sparse", [False, True])
def test_float32_over_pages_of_bfloat16_loses_their_rounding_alone(
    tmp_path, monkeypatch: pytest.MonkeyPatch, sparse: bool, chunk_tokens: int
) -> None:
    """The same as float32 pages into which rounded numbers were written."""
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    folder = make_checkpoint(tmp_path, keys, sparse=(40, 128))
    local = engine(folder, sparse=sparse, kv_cache_dtype="bfloat16")
    assert local.pool.memory.dtype == torch.bfloat16
    actual = local.logits(prompt_of(1000), chunk_tokens)
    write_pages = elementwise.write_pages

    def write_rounded(memory: torch.Tensor, *others: Any) -> None:
        write_pages(memory, *others)
        memory.copy_(memory.bfloat16())

    monkeypatch.setattr(elementwise, "write_pages", write_rounded)
    expected = engine(folder, sparse=sparse).logits(prompt_of(1000), chunk_tokens)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@formats
def test_pages_that_are_not_neighbours_read_the_same(dual_chunk: Path, kept: str) -> None:
    local = engine(dual_chunk, kv_cache_dtype=kept)
    prompt = prompt_of(1000)
    expected = local.logits(prompt, 256)
    held = local.pool.allocate(10)
    local.pool.release(held[::2])
    local.pool.release([held[1], held[7]])
    scattered = local.logits(prompt[:700], 256)
    alone = engine(dual_chunk, kv_cache_dtype=kept).logits(prompt[:700])
    torch.testing.assert_close(scattered, alone, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(scattered, expected)


@formats
def test_requests_may_take_turns_and_leave_no_page(dual_chunk: Path, kept: str) -> None:
    local = engine(dual_chunk, kv_cache_dtype=kept)
    prompts = {"first": prompt_of(500), "second": prompt_of(600)}
    alone = {
        name: engine(dual_chunk, kv_cache_dtype=kept).logits(prompt)
        for name, prompt in prompts.items()
    }
    for name, prompt in prompts.items():
        local.prefiller.admit(name, prompt)
    for start in (0, 256, 512):
        for name, prompt in prompts.items():
            if start < len(prompt):
                end = min(start + 256, len(prompt))
                result = local.prefiller.run_chunk(name, start, end)
                if end == len(prompt):
                    assert result.logits is not None
                    torch.testing.assert_close(result.logits, alone[name], rtol=1e-4, atol=1e-4)
    for name in prompts:
        local.prefiller.release(name)
    assert local.pool.num_free == local.pool.num_pages


def test_wrong_calls_are_refused_and_cost_nothing(dual_chunk: Path) -> None:
    local = engine(dual_chunk)
    prefiller = local.prefiller
    with pytest.raises(CacheTooSmallError) as refused:
        prefiller.admit("huge", prompt_of(1281))
    assert vars(refused.value) == {"phase": "prefill", "needed": 1281, "total": 1280}
    with pytest.raises(InvalidRequestError):
        prefiller.admit("empty", prompt_of(0))
    prefiller.admit("one", prompt_of(500))
    with pytest.raises(InvalidRequestError):
        prefiller.admit("one", prompt_of(5))
    with pytest.raises(OutOfPagesError):
        prefiller.admit("not now", prompt_of(1280))
    for start, end in ((128, 256), (0, 100), (0, 501), (0, 0)):
        with pytest.raises(InvalidRequestError):
            prefiller.run_chunk("one", start, end)
    with pytest.raises(InvalidRequestError):
        prefiller.run_chunk("other", 0, 128)
    prefiller.release("one")
    prefiller.release("one")
    assert local.pool.num_free == local.pool.num_pages


def test_pages_of_8_bits_are_the_same_for_every_chunk_size(dual_chunk: Path) -> None:
    prompt = prompt_of(1000)
    narrow = engine(dual_chunk, kv_cache_dtype="fp8_e4m3")
    whole = narrow.logits(prompt)
    held = widened(narrow, len(prompt))
    for chunk_tokens in (128, 384, 640):
        narrow.pool.memory.fill_(torch.nan)
        cut = narrow.logits(prompt, chunk_tokens)
        torch.testing.assert_close(cut, whole, rtol=2e-4, atol=2e-4)
        # Where float32 sums in another order lie on another side of a border between two values.
        assert (widened(narrow, len(prompt)) != held).double().mean() < 1e-4
    exact = engine(dual_chunk).logits(prompt)
    assert 0 < (whole - exact).norm() < 0.2 * exact.norm()


def widened(local: LocalPrefill, tokens: int) -> torch.Tensor:
    """The numbers in the first pages of all layers."""
    pages = slice(0, -(-tokens // 128))
    assert local.pool.scales is not None
    return local.pool.memory[:, pages].float() * local.pool.scales[:, pages, ..., None, None]


def test_too_little_memory_for_a_chunk_costs_that_chunk_alone(
    dual_chunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = engine(dual_chunk)
    prefiller, prompt = local.prefiller, prompt_of(600)
    expected = local.logits(prompt, 384)
    prefiller.admit("one", prompt)
    prefiller.run_chunk("one", 0, 384)

    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(elementwise, "swiglu", fail)
        with pytest.raises(ChunkOutOfMemoryError) as raised:
            prefiller.run_chunk("one", 384, 600)
        assert (raised.value.start, raised.value.end) == (384, 600)
    again = prefiller.run_chunk("one", 384, 600).logits
    assert again is not None
    torch.testing.assert_close(again, expected, rtol=0, atol=0)
    prefiller.release("one")
    assert local.pool.num_free == local.pool.num_pages
    torch.testing.assert_close(local.logits(prompt, 384), expected, rtol=0, atol=0)


def test_a_failed_chunk_leaves_no_activations_with_its_error(
    dual_chunk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    local = engine(dual_chunk)
    local.prefiller.admit("one", prompt_of(600))
    seen: list[weakref.ref[torch.Tensor]] = []

    def fail(gate_up: torch.Tensor) -> Any:
        seen.append(weakref.ref(gate_up))
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(elementwise, "swiglu", fail)
    with pytest.raises(OutOfMemoryError) as caught:
        local.prefiller.run_chunk("one", 0, 600)
    assert caught.value.__cause__ is not None
    assert [reference() for reference in seen] == [None]


def test_stages_tell_where_a_chunks_time_went(tmp_path: Path) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    local = engine(make_checkpoint(tmp_path, keys, sparse=(40, 128)))
    local.prefiller.admit("one", prompt_of(1000))
    started = time.perf_counter()
    stages = local.prefiller.run_chunk("one", 0, 1000).stages
    elapsed = time.perf_counter() - started
    wanted = {"linear", "attention", "selection", "elementwise", "page writes"}
    assert wanted <= stages.keys() <= wanted | {"communication", "hand-off"}
    assert all(seconds >= 0 for seconds in stages.values())
    assert sum(stages.values()) <= elapsed


@pytest.mark.parametrize("length", [1000, 1024])
def test_no_row_is_computed_both_sparsely_and_in_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_threshold": 0}
    local = engine(make_checkpoint(tmp_path, keys, sparse=(40, 128)))
    blocks: list[int] = []
    attention = sparse.attention

    def spy(queries: Any, which: Any, *others: Any) -> Any:
        blocks.extend(which.blocks)
        return attention(queries, which, *others)

    monkeypatch.setattr(sparse, "attention", spy)
    local.logits(prompt_of(length))
    full = (length - 128) // 128
    assert sorted(set(blocks)) == list(range(full))


@pytest.mark.parametrize("chunk_tokens", [128, 384, 1024])
def test_scores_are_those_of_the_definition(dual_chunk: Path, chunk_tokens: int) -> None:
    prompt, top = prompt_of(500), 3
    rows = torch.log_softmax(oracle_logits(dual_chunk, prompt.tolist()).float(), 1)[:-1]
    following = torch.from_numpy(prompt[1:]).long()
    local, scores, logits = engine(dual_chunk), [], None
    local.prefiller.admit("a", prompt)
    for start in range(0, len(prompt), chunk_tokens):
        end = min(start + chunk_tokens, len(prompt))
        result = local.prefiller.run_chunk("a", start, end, score_top=top)
        scores.append(result.scores)
        logits = result.logits
    found = torch.cat(scores)[:-1]
    own = rows.gather(1, following[:, None])[:, 0]
    best = rows.topk(top, dim=1)
    torch.testing.assert_close(found[:, 0], own, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found[:, 2 + top :], best.values, rtol=1e-3, atol=1e-3)
    named = rows.gather(1, found[:, 2 : 2 + top].long())
    torch.testing.assert_close(named, best.values, rtol=1e-3, atol=1e-3)
    ranks = (rows > own[:, None]).sum(1) + 1
    assert (found[:, 1] == ranks).float().mean() > 0.95
    assert logits is not None
    torch.testing.assert_close(logits, local.logits(prompt), rtol=2e-4, atol=2e-4)


@pytest.mark.parametrize(("layers_to_go", "computed"), [(1, 3), (2, 2), (9, 0)])
def test_a_chunk_is_nearly_computed_before_whole_layers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, layers_to_go: int, computed: int
) -> None:
    """Of the last of five next to nothing is computed: before it alone is no time for anything."""
    local = engine(make_checkpoint(tmp_path, layers=5))
    forward, seen = Layer.forward, list[int]()

    def counted(layer: Layer, *arguments: Any) -> None:
        seen.append(layer.number)
        forward(layer, *arguments)

    class Recorded(Milestone):
        @classmethod
        def after_what_is_launched(cls, device: torch.device) -> Milestone:
            reached.append(len(seen))
            return super().after_what_is_launched(device)

    reached: list[int] = []
    monkeypatch.setattr(Layer, "forward", counted)
    monkeypatch.setattr(chunk, "Milestone", Recorded)
    local.prefiller.admit("a", prompt_of(512))
    local.prefiller.run_chunk("a", 0, 256, layers_to_go=layers_to_go)
    assert (reached, len(seen)) == ([computed], 4)
