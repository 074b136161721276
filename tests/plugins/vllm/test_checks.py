"""What of vLLM's configuration is refused, by name; vLLM is not needed."""

from types import SimpleNamespace
from typing import Any

import pytest

from longreach.engine.errors import CheckpointError, LongreachError
from longreach.plugins.vllm.checks import TESTED, check, check_version, keep_long_prompts_apart
from longreach.plugins.vllm.errors import (
    BackendNotChosenError,
    NoDualChunkError,
    UnsupportedOptionError,
    UntestedVersionError,
)
from longreach.plugins.vllm.model_attention import ModelAttention, alike_up_to

DUAL_CHUNK = {"chunk_size": 1024, "local_size": 128, "original_max_position_embeddings": 2048}
RAW: dict[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"], "vocab_size": 10, "hidden_size": 32,
    "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-6, "rope_theta": 1e4,
    "max_position_embeddings": 1000, "dual_chunk_attention_config": DUAL_CHUNK,
}  # fmt: skip
BUDGETS = [{str(head): ["vertical_and_slash", 10 + head, 20, 1.0] for head in range(4)}] * 2


def configuration(raw: dict[str, Any] = RAW, backend: str | None = "CUSTOM", **changes: Any) -> Any:
    """As much of vLLM's as is looked at; `changes` are of any part of it."""
    parts = {
        "cache_config": {
            "cache_dtype": "auto", "user_specified_block_size": False, "block_size": 16,
            "enable_prefix_caching": True,
        },
        "parallel_config": {
            "prefill_context_parallel_size": 1, "decode_context_parallel_size": 1,
            "enable_dbo": False,
        },
        "scheduler_config": {"scheduler_cls": None},
        "model_config": {
            "model": "some/model", "dtype": "torch.bfloat16", "max_model_len": 1000,
            "enable_prompt_embeds": False,
            "architecture": raw["architectures"][0],
            "hf_config": SimpleNamespace(to_dict=lambda: raw, **raw),
        },
        "attention_config": {
            "backend": None if backend is None else SimpleNamespace(name=backend)
        },
    }  # fmt: skip
    made = {
        part: SimpleNamespace(**{key: changes.get(key, value) for key, value in keys.items()})
        for part, keys in parts.items()
    }
    return SimpleNamespace(speculative_config=changes.get("speculative_config"), **made)


def test_what_can_be_served_passes() -> None:
    check(configuration(), "0.26.0")
    check(
        configuration(cache_dtype="bfloat16", user_specified_block_size=True, block_size=256),
        "0.32.1",
    )


def test_other_models_are_left_alone() -> None:
    plain = {key: value for key, value in RAW.items() if key != "dual_chunk_attention_config"}
    check(configuration(plain, backend=None), "0.1.0")
    with pytest.raises(NoDualChunkError) as refused:
        check(configuration(plain), "0.26.0")
    assert refused.value.model == "some/model"


@pytest.mark.parametrize("backend", [None, "FLASH_ATTN"])
def test_a_backend_that_cannot_is_refused(backend: str | None) -> None:
    with pytest.raises(BackendNotChosenError) as refused:
        check(configuration(backend=backend), "0.26.0")
    assert "--attention-backend CUSTOM" in str(refused.value)


@pytest.mark.parametrize("version", ["0.25.9", "0.33.0", "1.0.0"])
def test_an_untested_version_is_refused_and_the_tested_ones_named(version: str) -> None:
    with pytest.raises(UntestedVersionError) as refused:
        check(configuration(), version)
    assert (refused.value.version, refused.value.first, refused.value.last) == (version, *TESTED)
    first, last = TESTED
    said = (
        f"tried with vLLM {first} and {last}, and lets those between in untried; this is {version}"
    )
    assert said in str(refused.value)


@pytest.mark.parametrize("version", ["0.26.0", "0.30.2", "0.32.0+cpu", "0.32.1rc2.dev3"])
def test_tested_versions_and_those_between_pass(version: str) -> None:
    check_version(version)


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        ("--kv-cache-dtype", {"cache_dtype": "fp8"}),
        ("--kv-cache-dtype", {"cache_dtype": "float16"}),
        ("--block-size", {"user_specified_block_size": True, "block_size": 64}),
        ("--speculative-config", {"speculative_config": object()}),
        ("--enable-prompt-embeds", {"enable_prompt_embeds": True}),
        ("--prefill-context-parallel-size", {"prefill_context_parallel_size": 2}),
        ("--decode-context-parallel-size", {"decode_context_parallel_size": 2}),
        ("--enable-dbo", {"enable_dbo": True}),
        ("--enable-prefix-caching", {"scheduler_cls": "mine.Scheduler"}),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(option: str, changes: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOptionError) as refused:
        check(configuration(**changes), "0.26.0")
    assert refused.value.option == option
    assert isinstance(refused.value, LongreachError)


def test_another_scheduler_may_be_chosen_without_prefix_caching() -> None:
    check(configuration(scheduler_cls="mine.Scheduler", enable_prefix_caching=False), "0.26.0")


def test_other_architectures_are_refused_or_left_to_vllm() -> None:
    other = {**RAW, "architectures": ["Qwen3ForCausalLM"]}
    with pytest.raises(CheckpointError, match="some/model"):
        check(configuration(other), "0.26.0")
    check(configuration(other, backend="FLASH_ATTN"), "0.26.0")


def test_sliding_windows_are_refused() -> None:
    with pytest.raises(CheckpointError):
        check(configuration({**RAW, "use_sliding_window": True}), "0.26.0")


@pytest.mark.parametrize("cached", [True, False])
def test_a_prefix_cache_gets_a_scheduler_that_keeps_long_prompts_apart(cached: bool) -> None:
    config = configuration(enable_prefix_caching=cached)
    keep_long_prompts_apart(config)
    assert (config.scheduler_config.scheduler_cls is not None) == cached
    # Layers look at the configuration once more.
    check(config, "0.26.0")


def test_prompts_are_alike_up_to_temperature_and_sparse_attention() -> None:
    with_budgets = {
        **RAW,
        "dual_chunk_attention_config": {**DUAL_CHUNK, "sparse_attention_config": BUDGETS},
    }
    keys = with_budgets["dual_chunk_attention_config"]
    assert alike_up_to(RAW) == 2048
    assert alike_up_to(with_budgets) == 2048
    keys["sparse_attention_threshold"] = 700
    assert alike_up_to(with_budgets) == 700
    keys["sparse_attention_enabled"] = False
    assert alike_up_to(with_budgets) == 2048


def test_each_rank_has_the_budgets_of_its_heads() -> None:
    keys = {**DUAL_CHUNK, "sparse_attention_config": BUDGETS, "sparse_attention_threshold": 100}
    raw = {**RAW, "dual_chunk_attention_config": keys}
    second = ModelAttention.of(raw, num_heads=2, num_kv_heads=1, rank=1)
    assert [budget.verticals for budget in second.budgets(1)] == [12, 13]
    assert second.group == 2
    assert not second.is_sparse(100)
    assert second.is_sparse(101)
    assert not ModelAttention.of(RAW, 4, 2, 0).is_sparse(10**6)
