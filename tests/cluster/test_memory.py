"""Ranks and workers on a GPU that is too small, or that another process has filled."""

import re
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from longreach.cluster import memory
from longreach.cluster.app import startup_failure
from longreach.cluster.decode import spanning
from longreach.cluster.decode.engines import make_engine
from longreach.cluster.memory import decode_fit, own_prompts, prefill_fit
from longreach.cluster.prefill.rank import Meeting, PrefillRank
from longreach.cluster.settings import Settings, load_settings
from longreach.engine.decode import decoder as decode
from longreach.engine.decode.step_rows import logits_rows
from longreach.engine.errors import (
    ChunkOutOfMemoryError,
    DoesNotFitError,
    LoadingOutOfMemoryError,
    LongreachError,
)
from longreach.engine.kv import pages
from longreach.engine.model import qwen2
from longreach.engine.prefill import prefiller as prefill
from longreach.kernels.page_size import pages_for

from .conftest import gangs_with, make_settings

CONFIGS = Path(__file__).parents[2] / "configs"
CARD = 149_000_000_000


def join(settings: Settings) -> None:
    PrefillRank(settings.gangs[0]).join(Meeting.of_one(), 0, 1)


def make_decoder(settings: Settings) -> None:
    make_engine(settings.worker, Mock())


@pytest.fixture
def shared() -> Settings:
    """The 7B's shape, prefill and decode on one card, pages of 16 bits for 819,200 tokens."""
    settings = load_settings(CONFIGS / "one-gpu-7b.yaml")
    tokens = {"kv_cache_tokens": 819_200}
    return settings.model_copy(
        update={
            "model": settings.model.model_copy(update={"kv_cache_dtype": "auto"}),
            "limits": settings.limits.model_copy(update={"max_model_len": 819_200}),
            "prefill": gangs_with(settings, **tokens),
            "decode": settings.decode.model_copy(update=tokens),
        }
    )


@pytest.fixture
def on_cpu() -> Settings:
    settings = make_settings(1)
    sizes = {"sequence_parallel": 1, "kv_cache_tokens": 2048}
    return settings.model_copy(
        update={
            "prefill": gangs_with(settings, **sizes),
            "decode": settings.decode.model_copy(update={"kv_cache_tokens": 2048}),
        }
    )


def without_memory(*arguments: object, **named: object) -> Any:
    raise torch.OutOfMemoryError("as the allocator says it\nin several lines")


@pytest.mark.parametrize(("name", "card"), [("one-gpu", 16e9), ("one-gpu-7b", CARD)])
def test_prefill_and_decode_fit_on_one_card_together(name: str, card: float) -> None:
    """Whichever comes last: the other has taken its own by then."""
    settings = load_settings(CONFIGS / f"{name}.yaml")
    (gang,) = settings.gangs
    assert gang.prefill.gpus_per_rank + settings.decode.gpus <= 1
    longest, tokens = settings.limits.max_model_len, gang.prefill.kv_cache_tokens
    decode = decode_fit(settings.worker, int(card))
    decode.check(settings.decode.kv_cache_tokens)
    taken = pages_for(settings.decode.kv_cache_tokens) * decode.bytes_per_page
    left = decode.free - decode.weights.num_bytes - taken - decode.computing_bytes(longest)
    prefill_fit(gang, left, 1).check(tokens, longest)


@pytest.mark.parametrize(
    ("start", "names"),
    [
        (join, {"prefill.kv_cache_tokens", "model.kv_cache_dtype", "model.weights",
                "prefill.chunk_tokens", "prefill.tensor_parallel", "prefill.gpus_per_rank"}),
        (make_decoder, {"decode.kv_cache_tokens", "model.kv_cache_dtype", "model.weights",
                        "decode.max_batch", "decode.prefill_alone", "decode.gpus",
                        "decode.tensor_parallel"}),
    ],
    ids=["prefill", "decode"],
)  # fmt: skip
def test_pages_that_do_not_fit_are_refused_before_anything_is_loaded(
    shared: Settings,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[Settings], None],
    names: set[str],
) -> None:
    """Nothing may touch a GPU either: there is none where this test runs."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(60e9))
    with pytest.raises(DoesNotFitError) as refused:
        start(shared)
    needs = refused.value.needs
    assert needs.cache_bytes == pytest.approx(47e9, rel=1e-3)
    assert needs.weight_bytes == pytest.approx(15.2e9, rel=1e-2)
    assert needs.free_bytes == 60e9
    remedy = refused.value.remedy or ""
    assert set(re.findall(r"\b[a-z]+\.[a-z_]+\b", remedy)) == names
    assert str(refused.value).count(remedy) == 1
    assert "\n" not in str(refused.value)


def test_each_rank_of_a_decode_worker_has_its_part_and_a_communicator(shared: Settings) -> None:
    small_steps = shared.decode.model_copy(update={"prefill_alone": 1024})
    decode = small_steps.model_copy(update={"tensor_parallel": 2})
    whole = decode_fit(replace(shared.worker, decode=small_steps), CARD).needs(819_200)
    half = decode_fit(replace(shared.worker, decode=decode), CARD).needs(819_200)
    assert half.weight_bytes == pytest.approx(whole.weight_bytes / 2, rel=1e-3)
    assert half.cache_bytes == pytest.approx(whole.cache_bytes / 2, rel=0.01)
    logits = 152_064 * 2 * logits_rows(decode.largest_batch, own_prompts(decode))
    assert 2**30 < half.computing_bytes - whole.computing_bytes + logits < 2**30 + 2 * logits


def test_the_number_that_is_named_would_fit(
    shared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(60e9))
    with pytest.raises(DoesNotFitError) as refused:
        join(shared)
    largest = refused.value.largest_cache
    prefill_fit(shared.gangs[0], int(60e9), 1).check(largest, shared.limits.max_model_len)


def test_two_ranks_on_one_card_do_not_both_take_all_of_it(
    shared: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has all pages of a prompt; 100 GB hold one rank, and not two."""
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(100e9))
    prefill = gangs_with(shared, sequence_parallel=2, gpus_per_rank=0.25)
    settings = shared.model_copy(update={"prefill": prefill})
    prefill_fit(settings.gangs[0], int(100e9), 1).check(819_200, 819_200)
    for rank in range(2):
        with pytest.raises(DoesNotFitError) as refused:
            PrefillRank(settings.gangs[0]).join(Meeting(("", 0), 2), rank, 2)
        assert (refused.value.needs.free_bytes, refused.value.needs.processes) == (50e9, 2)


def test_as_many_ranks_are_enough_as_have_room_for_their_part_of_a_chunk(shared: Settings) -> None:
    """Of four that compute 32,768 rows each; with fewer, each of them has more."""
    prefill = gangs_with(shared, sequence_parallel=4, chunk_tokens=131_072)
    (settings,) = shared.model_copy(update={"prefill": prefill}).gangs
    tokens, longest = settings.prefill.kv_cache_tokens, settings.max_prompt_tokens
    fewest = [
        prefill_fit(settings, card, 1).fewest_sequence_ranks(tokens, longest)
        for card in (10_000_000_000, 79_000_000_000, 90_000_000_000, CARD)
    ]
    # On the smallest they do not even fit as they are.
    assert fewest == [4, 3, 2, 1]


def test_what_is_counted_is_what_the_settings_take(shared: Settings) -> None:
    """A layer's pages are gathered for the object store; dense prefill selects nothing."""
    dense = shared.model_copy(update={"prefill": gangs_with(shared, sparse=False)})
    stored = shared.model_copy(
        update={"transport": shared.transport.model_copy(update={"kind": "object_store"})}
    )
    needed = prefill_fit(shared.gangs[0], CARD, 1).computing_bytes(819_200)
    assert prefill_fit(dense.gangs[0], CARD, 1).computing_bytes(819_200) < needed
    chunk = shared.gangs[0].prefill.chunk_tokens
    assert (
        prefill_fit(stored.gangs[0], CARD, 1).computing_bytes(819_200)
        == needed + chunk * 2 * 4 * 128 * 2
    )


@pytest.mark.parametrize("start", [join, make_decoder], ids=["prefill", "decode"])
def test_a_gpu_that_does_not_hold_the_weights_is_refused(
    shared: Settings, monkeypatch: pytest.MonkeyPatch, start: Callable[[Settings], None]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: int(16e9))
    with pytest.raises(DoesNotFitError) as refused:
        start(shared)
    assert refused.value.largest_cache == 0
    assert refused.value.remedy is not None
    assert "kv_cache_tokens" not in refused.value.remedy


@pytest.mark.parametrize("start", [join, make_decoder], ids=["prefill", "decode"])
def test_a_cpu_is_not_asked_what_it_has(
    on_cpu: Settings, monkeypatch: pytest.MonkeyPatch, start: Callable[[Settings], None]
) -> None:
    monkeypatch.setattr(memory, "free_bytes", lambda device: 1)
    start(on_cpu)


@pytest.mark.parametrize(
    ("start", "setting", "place", "name"),
    [
        (join, "prefill.kv_cache_tokens", qwen2.Qwen2, "from_weights"),
        (join, "prefill.kv_cache_tokens", pages.PagePool, "__init__"),
        (join, "prefill.kv_cache_tokens", prefill, "_widened"),
        (make_decoder, "decode.kv_cache_tokens", spanning, "load_model"),
        (make_decoder, "decode.kv_cache_tokens", pages.PagePool, "__init__"),
        (make_decoder, "decode.kv_cache_tokens", decode, "make_step"),
    ],
)
def test_memory_that_others_allocated_meanwhile_is_refused_with_the_same_remedies(
    on_cpu: Settings,
    monkeypatch: pytest.MonkeyPatch,
    start: Callable[[Settings], None],
    setting: str,
    place: Any,
    name: str,
) -> None:
    narrow = on_cpu.model.model_copy(update={"kv_cache_dtype": "fp8_e4m3"})
    monkeypatch.setattr(place, name, without_memory)
    with pytest.raises(LoadingOutOfMemoryError) as raised:
        start(on_cpu.model_copy(update={"model": narrow}))
    assert raised.value.needs.cache_tokens == 2048
    assert raised.value.remedy is not None
    assert raised.value.remedy.startswith(f"take fewer {setting}, model.weights fp8")
    assert "\n" not in str(raised.value)


def test_warming_up_without_memory_names_settings_that_are_too_large(
    on_cpu: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rank that is on a GPU as far as it knows; its chunk raises what a chunk raises."""
    on_gpu = gangs_with(on_cpu, gpus_per_rank=0.5)
    settings = on_cpu.model_copy(
        update={
            "prefill": on_gpu,
            "limits": on_cpu.limits.model_copy(update={"max_model_len": 2048}),
        }
    )
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch, "device", lambda name: cpu)
    monkeypatch.setattr(prefill, "run_chunk", without_memory)
    with pytest.raises(LoadingOutOfMemoryError) as raised:
        join(settings)
    assert raised.value.remedy is not None
    assert "prefill.chunk_tokens" in raised.value.remedy
    cause = raised.value.__cause__
    assert isinstance(cause, ChunkOutOfMemoryError)
    assert (cause.start, cause.end) == (0, settings.gangs[0].prefill.chunk_tokens)


def test_what_a_process_said_at_its_start_is_what_a_user_is_told(
    on_cpu: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a trace with all that led to it, as Serve keeps it."""
    monkeypatch.setattr(pages.PagePool, "__init__", without_memory)
    with pytest.raises(LongreachError) as raised:
        join(on_cpu)
    trace = "".join(traceback.format_exception(raised.value))
    assert startup_failure([trace]) == str(raised.value)
    assert "prefill.kv_cache_tokens" in str(raised.value)


def test_a_prompt_alone_makes_the_largest_step(shared: Settings) -> None:
    def computing(**steps: int) -> int:
        decode = shared.decode.model_copy(update=steps)
        return (
            decode_fit(replace(shared.worker, decode=decode), CARD).needs(819_200).computing_bytes
        )

    row = 2 * 18_944 * 2  # of the MLP alone, in 16 bits
    more = computing() - computing(prefill_alone=1024)
    assert more > (8192 - 1024) * row
    assert computing() == computing(prefill_alone=8192)
