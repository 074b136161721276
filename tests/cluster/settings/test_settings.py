"""Configurations that run, and what is said about those that cannot."""

import copy
import io
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from rich.console import Console

from longreach.cluster.cli.explain import explain, kv_bytes
from longreach.cluster.settings import check_model, load_settings, parse_settings, warnings_about
from longreach.engine.decode.sequences import pages_needed
from longreach.engine.errors import CheckpointError, ConfigurationError, TensorParallelError
from longreach.engine.kv.pages import PageGeometry, PagePool
from longreach.engine.messages import GenerationRequest, SamplingParameters
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer
from longreach.kernels.page_size import PAGE_TOKENS, pages_for

LAPTOP = Path(__file__).parents[3] / "configs" / "laptop.yaml"


@pytest.fixture
def raw() -> dict[str, Any]:
    return yaml.safe_load(LAPTOP.read_text())


def test_the_laptop_configuration_serves_a_million_tokens() -> None:
    settings = load_settings(LAPTOP)
    assert settings.limits.max_model_len >= 1 << 20
    assert settings.model.folder.is_dir()
    assert [gang.num_ranks for gang in settings.prefill] == [2]


def test_kv_memory_is_what_pools_take(raw: dict[str, Any]) -> None:
    for dtype, name in itertools.product(("float32", "auto"), ("auto", "bfloat16", "fp8_e4m3")):
        raw["model"] |= {"dtype": dtype, "kv_cache_dtype": name}
        settings = parse_settings(raw)
        model = ModelConfig.from_folder(settings.model.folder)
        sizes = (model.num_layers, model.num_kv_heads, model.head_dim, torch.float32)
        geometry = PageGeometry(*sizes).kept_as(settings.model.pages_kept_as)
        pool = PagePool(geometry, 3, torch.device("cpu"))
        taken = pool.memory.nbytes + (0 if pool.scales is None else pool.scales.nbytes)
        assert kv_bytes(settings, model, 2 * PAGE_TOKENS + 1) == taken


def test_pages_are_alike_where_processes_compute_in_types_of_their_own(raw: dict[str, Any]) -> None:
    raw["model"] |= {"dtype": "auto", "kv_cache_dtype": "auto"}
    assert parse_settings(raw).model.pages_kept_as == "bfloat16"
    raw["model"]["dtype"] = "float16"
    assert parse_settings(raw).model.pages_kept_as == "auto"


def test_who_waits_for_others_may_take_longer_to_go(raw: dict[str, Any]) -> None:
    raw["shutdown"] = {"drain_seconds": 100.0}
    shutdown = parse_settings(raw).shutdown
    assert shutdown.drain_seconds < shutdown.decode_seconds < shutdown.ingress_seconds
    raw["shutdown"]["hand_over_seconds"] = 10.0
    shutdown = parse_settings(raw).shutdown
    assert (shutdown.decode_seconds, shutdown.ingress_seconds) == (110.0, 110.0)
    settings = parse_settings(raw)
    assert settings.gangs[0].others_seconds == shutdown.decode_seconds
    assert settings.gangs[0].terms == settings.worker.terms


def test_what_is_begun_again_nowhere_is_not_handed_over(raw: dict[str, Any]) -> None:
    raw["limits"]["retries"] = 0
    assert parse_settings(raw).shutdown.hand_over_seconds
    raw["shutdown"] = {"hand_over_seconds": 0.0}
    shutdown = parse_settings(raw).shutdown
    assert shutdown.drain_seconds == shutdown.decode_seconds == shutdown.ingress_seconds
    raw["shutdown"] = {"hand_over_seconds": 10.0}
    with pytest.raises(ConfigurationError, match=r"limits\.retries 0"):
        parse_settings(raw)


def test_weights_of_8_bits_on_gpus_want_bfloat16(raw: dict[str, Any]) -> None:
    raw["model"] |= {"weights": "fp8", "dtype": "float16"}
    assert parse_settings(raw).model.weights == "fp8"
    raw["decode"]["gpus"] = 1.0
    with pytest.raises(ConfigurationError, match=r"model\.weights fp8 .* float16"):
        parse_settings(raw)
    raw["model"]["dtype"] = "auto"
    assert parse_settings(raw).model.weights == "fp8"


def test_gpus_want_pages_in_the_models_type() -> None:
    raw = yaml.safe_load((LAPTOP.parent / "one-gpu.yaml").read_text())
    raw["model"] |= {"dtype": "float32", "kv_cache_dtype": "bfloat16"}
    with pytest.raises(ConfigurationError, match=r"model\.dtype float32"):
        parse_settings(raw)
    raw["model"]["dtype"] = "auto"
    assert parse_settings(raw).model.pages_kept_as == "bfloat16"


def test_a_random_shape_that_is_not_there_is_refused(raw: dict[str, Any]) -> None:
    raw["model"]["path"] = "random/qwen2.5-7b"
    with pytest.raises(CheckpointError, match=r"random/qwen2\.5-7b-1m"):
        check_model(parse_settings(raw))
    raw["model"]["path"] = "random/qwen2.5-7b-1m"
    with pytest.raises(ConfigurationError, match="1010000"):
        check_model(parse_settings(raw))
    raw["limits"]["max_model_len"] = 1_000_000
    check_model(parse_settings(raw))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model": {"weights": "fp8"}}, "model.weights fp8 is not for decode.engine vllm"),
        ({"model": {"kv_cache_dtype": "fp8_e4m3"}}, "model.kv_cache_dtype fp8_e4m3 is not for"),
        (
            {"model": {"dtype": "float32", "kv_cache_dtype": "bfloat16"}},
            "model.kv_cache_dtype bfloat16 beside model.dtype float32",
        ),
        ({"decode": {"prefill_up_to": 200_000}}, "lower decode.prefill_up_to"),
        (
            {"limits": {"max_output_tokens": 4097}, "decode": {"kv_cache_tokens": 1_090_560}},
            "make it 1091584 or more",
        ),
    ],
)
def test_what_only_the_own_engine_does_is_refused_beside_vllm(
    raw: dict[str, Any], changes: dict[str, dict[str, Any]], said: str
) -> None:
    changed = {**raw, **{name: {**raw[name], **values} for name, values in changes.items()}}
    parse_settings(changed)
    with pytest.raises(ConfigurationError, match=re.escape(said)):
        parse_settings({**changed, "decode": {**changed["decode"], "engine": "vllm"}})


def test_vllm_is_for_models_with_dual_chunks(raw: dict[str, Any], tmp_path: Path) -> None:
    engine = {**raw["decode"], "engine": "vllm"}
    check_model(parse_settings({**raw, "decode": engine}))
    folder = CHECKPOINT
    for path in folder.iterdir():
        (tmp_path / path.name).symlink_to(path)
    config = json.loads((folder / "config.json").read_text())
    del config["dual_chunk_attention_config"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps(config))
    model = {**raw["model"], "path": str(tmp_path)}
    check_model(parse_settings({**raw, "model": model}))
    with pytest.raises(ConfigurationError, match=r"set decode\.engine: native"):
        check_model(parse_settings({**raw, "model": model, "decode": engine}))


@pytest.mark.parametrize(
    ("where", "value", "said"),
    [
        ("prefil", {}, "unknown key 'prefil'"),
        ("prefill.chunk_token", 128, "unknown key 'prefill.chunk_token'"),
        ("prefill.chunk_tokens", 1000, "prefill.chunk_tokens is 1000"),
        ("prefill.chunk_tokens", "many", "prefill.chunk_tokens"),
        ("prefill.chunk_tokens", 1024.5, "prefill.chunk_tokens"),
        ("prefill.sequence_parallel", 0, "prefill.sequence_parallel"),
        ("prefill.kv_cache_tokens", 4096, "prefill.kv_cache_tokens (4096)"),
        ("prefill.placement", "TIGHT", "STRICT_PACK"),
        ("model.kv_cache_dtype", "fp8_e5m2", "'auto', 'bfloat16' or 'fp8_e4m3'"),
        ("prefill.cpus_per_rank", 0.0, "prefill.cpus_per_rank"),
        ("prefill.patience", 0.0, "prefill.patience"),
        ("prefill.ageing", 50_000.0, "prefill.patience"),
        ("decode.patience", -1.0, "decode.patience"),
        ("decode.kv_cache_tokens", 1_056_768, "1090560"),
        ("decode.max_batch", 4, "decode.max_batch (4)"),
        ("decode.prefill_at_once", 1000, "decode.prefill_at_once is 1000"),
        ("decode.prefill_alone", 256, "decode.prefill_alone (256)"),
        ("decode.prefill_up_to", -1, "decode.prefill_up_to"),
        ("limits.max_output_tokens", 2_000_000, "limits.max_output_tokens (2000000)"),
        ("limits.max_queued_requests", 1001, "limits.max_queued_requests"),
        ("model.dtype", "int8", "model.dtype"),
        ("ingress.port", 70_000, "ingress.port"),
        ("ingress.progress_seconds", 3.0, "ingress.progress_seconds"),
        ("transport.kind", "pigeon", "transport.kind"),
        ("transport.kind", "cuda_ipc", "prefill.gpus_per_rank"),
    ],
)
def test_what_cannot_run_is_refused(raw: dict[str, Any], where: str, value: Any, said: str) -> None:
    *sections, key = where.split(".")
    changed = copy.deepcopy(raw)
    section = changed
    for name in sections:
        section = section.setdefault(name, {})
    section[key] = value
    if key in ("max_output_tokens",):
        changed["decode"]["kv_cache_tokens"] = 100_000_000
    with pytest.raises(ConfigurationError) as refused:
        parse_settings(changed)
    assert said in str(refused.value)


def test_cuda_ipc_wants_gpus_of_one_host() -> None:
    raw = yaml.safe_load((LAPTOP.parent / "one-gpu.yaml").read_text())
    assert parse_settings(raw).transport.kind == "cuda_ipc"
    for section, key in (("prefill", "gpus_per_rank"), ("decode", "gpus")):
        without = copy.deepcopy(raw)
        without[section][key] = 0.0
        with pytest.raises(ConfigurationError, match=rf"{section}\.{key}"):
            parse_settings(without)


@pytest.mark.parametrize("placement", ["PACK", "SPREAD", "STRICT_SPREAD"])
def test_cuda_ipc_wants_a_gang_on_one_host(placement: str) -> None:
    """Else the first request finds out, and each after it."""
    raw = yaml.safe_load((LAPTOP.parent / "one-gpu.yaml").read_text())
    raw["prefill"]["placement"] = placement
    parse_settings(raw)  # a single rank is always on one host
    raw["prefill"]["sequence_parallel"] = 2
    with pytest.raises(ConfigurationError, match=rf"prefill\.placement, {placement},"):
        parse_settings(raw)
    raw["transport"]["kind"] = "object_store"
    parse_settings(raw)
    raw["transport"]["kind"], raw["prefill"]["placement"] = "cuda_ipc", "STRICT_PACK"
    parse_settings(raw)


@given(
    max_model_len=st.integers(2, 1000),
    max_output_tokens=st.integers(1, 300),
    max_choices=st.integers(1, 8),
)
def test_pages_that_are_called_enough_hold_every_request(
    max_model_len: int, max_output_tokens: int, max_choices: int
) -> None:
    """Whatever the decoder would reserve for a request within the limits."""
    assume(max_output_tokens < max_model_len)
    changed = yaml.safe_load(LAPTOP.read_text())
    changed["limits"] = {
        "max_model_len": max_model_len,
        "max_output_tokens": max_output_tokens,
        "max_choices": max_choices,
    }
    changed["decode"]["kv_cache_tokens"] = 1
    with pytest.raises(ConfigurationError, match=r"decode\.kv_cache_tokens") as refused:
        parse_settings(changed)
    changed["decode"]["kv_cache_tokens"] = int(str(refused.value).split()[-3])
    enough = pages_for(parse_settings(changed).decode.kv_cache_tokens)
    for tokens in range(1, max_model_len):
        answer = min(max_output_tokens, max_model_len - tokens)
        sampling = SamplingParameters(max_tokens=answer, choices=max_choices)
        request = GenerationRequest("a", np.zeros(tokens, dtype=np.int32), sampling, 0.0)
        assert pages_needed(request) <= enough


def test_a_missing_section_is_named(raw: dict[str, Any]) -> None:
    del raw["prefill"]["kv_cache_tokens"]
    with pytest.raises(ConfigurationError, match=r"'prefill.kv_cache_tokens' is missing"):
        parse_settings(raw)
    with pytest.raises(ConfigurationError, match="model:"):
        parse_settings(None)


def test_limits_of_the_checkpoint_count(raw: dict[str, Any]) -> None:
    raw["limits"]["max_model_len"] = 8_000_000
    raw["prefill"]["kv_cache_tokens"] = raw["decode"]["kv_cache_tokens"] = 9_000_000
    with pytest.raises(ConfigurationError, match=r"limits\.max_model_len \(8000000\)"):
        check_model(parse_settings(raw))
    raw["limits"]["max_model_len"] = 10_000
    raw["prefill"]["tensor_parallel"] = 3
    with pytest.raises(TensorParallelError) as refused:
        check_model(parse_settings(raw))
    assert (refused.value.ranks, refused.value.possible) == (3, (1, 2, 4))
    raw["model"]["path"] = "/nowhere"
    with pytest.raises(CheckpointError, match="/nowhere"):
        check_model(parse_settings(raw))


@pytest.fixture
def without_budgets(raw: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    for path in CHECKPOINT.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "sparse_attention_config.json").unlink()
    raw["model"]["path"] = str(tmp_path)
    raw["prefill"].pop("sparse", None)
    return raw


def test_sparse_prefill_that_is_asked_for_needs_budgets(without_budgets: dict[str, Any]) -> None:
    raw = without_budgets
    raw["prefill"]["sparse"] = True
    with pytest.raises(ConfigurationError, match=r"prefill\.sparse .* 2,048 tokens"):
        check_model(parse_settings(raw))
    raw["limits"] |= {"max_model_len": 2_048, "max_output_tokens": 512}
    check_model(parse_settings(raw))
    assert warnings_about(parse_settings(raw)) == []


def test_dense_prefill_of_long_prompts_is_said_where_nobody_asked_for_it(
    without_budgets: dict[str, Any],
) -> None:
    raw = without_budgets
    check_model(parse_settings(raw))
    [warning] = warnings_about(parse_settings(raw))
    assert "prefill.sparse" in warning
    Console(file=(text := io.StringIO())).print(explain(parse_settings(raw)))
    assert "warning: prefill.sparse" in text.getvalue()
    raw["prefill"]["sparse"] = False
    check_model(parse_settings(raw))
    assert warnings_about(parse_settings(raw)) == []


def test_the_threshold_is_the_checkpoints_own(
    without_budgets: dict[str, Any], tmp_path: Path
) -> None:
    config = json.loads((tmp_path / "config.json").read_text())
    config["dual_chunk_attention_config"]["sparse_attention_threshold"] = 2_000_000
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert warnings_about(parse_settings(without_budgets)) == []


def test_a_token_without_a_row_in_the_embedding_is_refused(
    raw: dict[str, Any], tmp_path: Path
) -> None:
    for path in CHECKPOINT.glob("*.json"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    raw["model"]["path"] = str(tmp_path)
    check_model(parse_settings(raw))
    config = json.loads((tmp_path / "config.json").read_text())
    tokens = Tokenizer(tmp_path).vocab_size
    config["vocab_size"] = tokens - 1
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"up to {tokens - 1} .* {tokens - 1} rows"):
        check_model(parse_settings(raw))


@pytest.mark.parametrize("content", [b"a: [", b"\xff", b""])
def test_files_that_say_nothing_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cluster.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigurationError, match=path.name):
        load_settings(path)


@pytest.fixture
def two_gangs(raw: dict[str, Any]) -> dict[str, Any]:
    short = {"name": "short", "max_prompt_tokens": 8192, "kv_cache_tokens": 65536}
    short["chunk_tokens"] = 65_536
    return raw | {"prefill": [short, {"name": "long", **raw["prefill"]}]}


def test_gangs_are_listed_in_the_order_of_the_lengths_that_they_take(
    raw: dict[str, Any], two_gangs: dict[str, Any]
) -> None:
    longest = raw["limits"]["max_model_len"]
    one = parse_settings(raw)
    assert [gang.max_prompt_tokens for gang in one.gangs] == [longest]
    assert parse_settings(raw | {"prefill": [raw["prefill"]]}) == one
    several = parse_settings(two_gangs)
    assert [gang.max_prompt_tokens for gang in several.gangs] == [8192, longest]
    assert [gang.prefill.name for gang in several.gangs] == ["short", "long"]
    assert several.worker.longest_chunk == 65_536
    check_model(several)


@pytest.mark.parametrize(
    ("gang", "values", "said"),
    [
        (0, {"name": "long"}, "two gangs of the name 'long'"),
        (0, {"name": None}, "one has no `name`"),
        (0, {"name": "Short ones"}, "prefill.0.name"),
        (0, {"max_prompt_tokens": None}, "max_prompt_tokens of gang 'long' (1056768) leaves it no"),
        (0, {"max_prompt_tokens": 2_000_000}, "max_prompt_tokens of gang 'long' (1056768)"),
        (0, {"max_prompt_tokens": 0}, "prefill.0.max_prompt_tokens"),
        (0, {"max_prompt_tokens": 2048}, "lower decode.prefill_up_to"),
        (1, {"max_prompt_tokens": 524_288}, "is 524288 and limits.max_model_len is 1056768"),
        (1, {"max_prompt_tokens": 2_000_000}, "is 2000000 and limits.max_model_len is 1056768"),
        (0, {"kv_cache_tokens": 8064}, "kv_cache_tokens of gang 'short' (8064) cannot hold"),
        (1, {"kv_cache_tokens": 1_048_576}, "kv_cache_tokens of gang 'long' (1048576) cannot hold"),
        (1, {"chunk_tokens": 1000}, "chunk_tokens of gang 'long' is 1000"),
        (0, {"cpus_per_rank": 0.0}, "cpus_per_rank of gang 'short' and gpus_per_rank are both 0"),
        (1, {"chunk_token": 128}, "unknown key 'prefill.1.chunk_token'"),
    ],
)
def test_gangs_that_cannot_run_are_refused_by_name(
    two_gangs: dict[str, Any], gang: int, values: dict[str, Any], said: str
) -> None:
    two_gangs["prefill"][gang] |= values
    with pytest.raises(ConfigurationError) as refused:
        parse_settings(two_gangs)
    assert said in str(refused.value)


@pytest.mark.parametrize("prefill", [[], 5, None, ["short"]])
def test_prefill_is_a_gang_or_a_list_of_gangs(raw: dict[str, Any], prefill: object) -> None:
    with pytest.raises(ConfigurationError):
        parse_settings(raw | {"prefill": prefill})


def test_every_gang_must_divide_the_model(two_gangs: dict[str, Any]) -> None:
    two_gangs["prefill"][1]["tensor_parallel"] = 3
    with pytest.raises(ConfigurationError):
        check_model(parse_settings(two_gangs))


def test_ranks_of_a_decode_worker_must_divide_its_model(raw: dict[str, Any]) -> None:
    """KV heads are not held twice: the pocket model, which has 2, takes 2 ranks and not 4."""
    raw["decode"]["tensor_parallel"] = 2
    check_model(parse_settings(raw))
    for ranks in (3, 4):
        raw["decode"]["tensor_parallel"] = ranks
        with pytest.raises(ConfigurationError, match=r"decode\.tensor_parallel .* one of 1, 2$"):
            check_model(parse_settings(raw))


@pytest.mark.parametrize(("asks", "said"), [({"gpus": 0.5}, "decode.gpus"), ({"cpus": 0.0}, "CPU")])
def test_ranks_of_a_decode_worker_are_placed_by_what_each_asks_for(
    raw: dict[str, Any], asks: dict[str, float], said: str
) -> None:
    raw["decode"] |= asks
    parse_settings(raw)
    raw["decode"]["tensor_parallel"] = 2
    with pytest.raises(ConfigurationError, match=said):
        parse_settings(raw)


def test_one_gang_leaves_no_length_out(raw: dict[str, Any]) -> None:
    raw["prefill"]["max_prompt_tokens"] = 8192
    with pytest.raises(ConfigurationError, match=r"prefill\.max_prompt_tokens is 8192"):
        parse_settings(raw)


@pytest.mark.parametrize(
    ("decode", "alone"),
    [
        ({"gpus": 1}, 8192),
        ({"gpus": 1, "prefill_up_to": 6000}, 6000),
        ({"gpus": 1, "prefill_alone": 100_000}, 8192),
        ({"gpus": 1, "prefill_at_once": 4096, "prefill_up_to": 2048}, 4096),
        ({"gpus": 1, "engine": "vllm"}, 1024),
        ({"gpus": 0}, 512),
        ({"gpus": 0, "prefill_alone": 1024}, 1024),
    ],
)
def test_a_step_has_no_more_of_a_prompt_alone_than_prompts_have(
    raw: dict[str, Any], decode: dict[str, Any], alone: int
) -> None:
    settings = parse_settings(raw).decode.model_copy(update=decode)
    assert settings.prompt_tokens_alone == alone
