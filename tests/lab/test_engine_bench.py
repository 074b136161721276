"""The engine's benchmark: what it counts, what it refuses, and one small run of all of it."""

import csv
import json
import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from longreach.engine.errors import ConfigurationError, DoesNotFitError, TensorParallelError
from longreach.engine.kv.pages import PagePool
from longreach.engine.memory.fit import WINDOW_TOKENS, PrefillFit
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.model.shapes import known_shapes
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.attention import SparseAttention
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.prefill.selection import Window
from longreach.engine.prefill.sparsity import SparsityConfig
from longreach.kernels import sparse
from longreach.kernels.dual_chunk import QueryBlocks, SegmentQueries
from longreach.kernels.pages import LayerPages
from longreach.kernels.sparse import HeadBudget, Selections
from longreach.lab.engine_bench import mesh_rank, prompts, scaling
from longreach.lab.engine_bench.__main__ import main
from longreach.lab.engine_bench.density import Density
from longreach.lab.engine_bench.fit import fit
from longreach.lab.engine_bench.lone_rank import LoneRank, Recorded
from longreach.lab.engine_bench.options import parse
from longreach.lab.engine_bench.remedies import remedied
from longreach.lab.engine_bench.scaling import Traffic, compute_seconds
from longreach.lab.engine_bench.subject import Subject, load, page_geometry
from longreach.lab.engine_bench.work import Work

QWEN_7B = ModelConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
QWEN_14B = ModelConfig.from_folder(known_shapes()["qwen2.5-14b-1m"])
BENCHES = Path(__file__).parents[2] / "docs" / "bench"
H200_BYTES, H100_BYTES = int(149e9), int(83e9)


def fit_of(config: ModelConfig, kv_cache: str, free: int) -> PrefillFit:
    sparsity = SparsityConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
    return fit(Work(config), page_geometry(config, kv_cache), 32768, free, sparsity)


def test_the_floors_are_the_designs() -> None:
    work = Work(QWEN_7B)
    # /28 because nobody wants the last layer's rows.
    assert work.linear_flops(2**20) == pytest.approx(1.37e16 * 27 / 28, rel=0.01)
    assert work.attention_flops(2**20) == pytest.approx(2.2e17 * 27 / 28, rel=0.01)
    assert work.weights.num_bytes == pytest.approx(15.2e9, rel=0.01)
    assert work.decode_bytes([1_000_000], 57_344) == pytest.approx(14.1e9 + 57.3e9, rel=0.01)
    narrow = Work(QWEN_7B, kept="fp8")
    assert narrow.decode_bytes([1_000_000], 57_344) == pytest.approx(7.6e9 + 57.3e9, rel=0.01)


@pytest.mark.parametrize(
    ("config", "kv_cache", "free", "tokens"),
    [
        (QWEN_7B, "bf16", H100_BYTES, 1_000_064),
        (QWEN_14B, "bf16", H200_BYTES, 2**19),
        (QWEN_14B, "fp8", H200_BYTES, 1_000_064),
    ],
)
def test_what_the_cards_are_meant_to_hold_fits(config, kv_cache, free, tokens) -> None:
    fit_of(config, kv_cache, free).check(tokens)


def test_too_long_a_prompt_is_refused_with_what_fits_and_what_helps() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        fit_of(QWEN_14B, "bf16", H200_BYTES).check(1_000_064)
    assert refused.value.needs.cache_bytes == pytest.approx(196.6e9, rel=1e-3)
    fit_of(QWEN_14B, "bf16", H200_BYTES).check(refused.value.largest_cache)
    assert "--kv-cache fp8" in str(remedied(refused.value))
    with pytest.raises(DoesNotFitError) as refused:
        fit_of(QWEN_14B, "fp8", H100_BYTES).check(1_000_064)
    assert "--kv-cache" not in str(remedied(refused.value))
    assert "--weights fp8" in str(refused.value)
    assert "--tokens" in str(refused.value)
    narrow = Work(QWEN_14B, kept="fp8")
    with pytest.raises(DoesNotFitError) as refused:
        fit(narrow, page_geometry(QWEN_14B, "fp8"), 32768, H100_BYTES, None).check(1_000_064)
    assert "fp8" not in str(remedied(refused.value))


def test_pages_of_8_bits_take_a_layer_in_16_bits_beside_them() -> None:
    wide, narrow = (fit_of(QWEN_14B, kept, H200_BYTES).largest_cache() for kept in ("bf16", "fp8"))
    # 48 layers of 1 byte and 4 / 16384 a number, and one of 2, instead of 48 of 2.
    assert narrow / wide == pytest.approx(2 * 48 / (48 * (1 + 4 / 2**14) + 2), rel=0.01)


@pytest.mark.parametrize(
    "tokens", [WINDOW_TOKENS, WINDOW_TOKENS + 128, 20480, 57344, 188416, 4 * WINDOW_TOKENS]
)
def test_sums_are_counted_for_as_many_windows_as_a_chunk_is_cut_into(tokens: int) -> None:
    sparsity = SparsityConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
    assert sparsity is not None
    work, pages = Work(QWEN_7B), page_geometry(QWEN_7B, "bf16")
    prompt = 16 * WINDOW_TOKENS
    sparse, dense = (
        fit(work, pages, tokens, H200_BYTES, each).computing_bytes(prompt)
        for each in (sparsity, None)
    )
    of_one = 6 * 4 * QWEN_7B.num_heads * prompt
    starts = range(0, prompt - tokens, tokens)
    most = max(len(Window.cut(start, start + tokens, sparsity)) for start in starts)
    assert (sparse - dense) / of_one == most


def test_too_small_a_device_is_refused() -> None:
    with pytest.raises(DoesNotFitError) as refused:
        fit_of(QWEN_7B, "bf16", int(16e9)).check(128)
    assert refused.value.largest_cache == 0
    assert "--shape" in str(remedied(refused.value))
    assert "--tokens" not in str(refused.value)


def test_dense_prompts_that_would_take_too_long_are_left_out(folder: Path) -> None:
    options = parse([*arguments_of(folder, folder), "--dense-up-to", "300"])
    model = load(options.files, torch.device("cpu"), 0, "auto")
    subject = Subject.of(options.files, model, "bf16", 256, 256, 0)
    assert prompts._prompts(options, subject) == [(300, False), (700, True)]


def test_density_counts_whole_tiles_and_the_columns_before_them() -> None:
    empty = torch.empty(0)
    selections = Selections.of([[3, 300], [7]], [[0, 2], [0, 1, 3]])
    seen = SparseAttention(
        0, SegmentQueries(empty, empty, empty), QueryBlocks((2, 4), 5 * 128),
        LayerPages.of(empty, [0]), None, 1.0, empty, selections,
    )  # fmt: skip
    density = Density(torch.device("cpu"))
    density(seen)
    density(seen)
    tiles, columns = (2 + 2) + (2 + 3), (1 + 2) + (1 + 1)
    assert density.of(1000.0) == 2 * 128 * (tiles * 128 + columns) / 1000
    assert density.of(1000.0) == 0


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The pocket model, sparse from 512 tokens on."""
    copied = Path(shutil.copytree(CHECKPOINT, tmp_path / "checkpoint"))
    config = json.loads((copied / "config.json").read_text())
    config["dual_chunk_attention_config"]["sparse_attention_threshold"] = 512
    (copied / "config.json").write_text(json.dumps(config))
    return copied


def lines_of(path: Path) -> list[dict[str, str]]:
    """In the columns of the file of that name in the docs, to which lines are added."""
    with path.open(newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    kept = (BENCHES / path.name).read_text("utf-8").splitlines()[0]
    assert list(lines[0]) == kept.split(",")
    return lines


def arguments_of(folder: Path, path: Path) -> list[str]:
    return [
        "--checkpoint", str(folder), "--tokens", "700,300", "--attention", "sparse,dense",
        "--chunk-tokens", "384", "--decode", "3", "--batches", "1x200,1x1K+3x50",
        "--csv", str(path), "--commit", "abc",
    ]  # fmt: skip


@pytest.mark.parametrize(("kv_cache", "weights"), [("bf16", "auto"), ("fp8", "fp8")])
def test_a_run_with_the_pocket_model(
    folder: Path, tmp_path: Path, capsys, kv_cache: str, weights: str
) -> None:
    path = tmp_path / "new" / "engine.csv"
    assert main([*arguments_of(folder, path), "--kv-cache", kv_cache, "--weights", weights])
    lines = lines_of(path)
    assert {line["weights"] for line in lines} == {
        "checkpoint" if weights == "auto" else "checkpoint, fp8"
    }
    assert [(line["tokens"], line["attention"]) for line in lines[:3]] == [
        ("300", "dense"), ("700", "sparse"), ("700", "dense"),
    ]  # fmt: skip
    assert [line["case"] for line in lines[3:]] == [
        "decode 1 x 200", "decode 1 x 1,024 + 3 x 50",
    ]  # fmt: skip
    for line in lines[:3]:
        spent = float(line["linear"]) + float(line["attending"])
        assert 0 < spent <= float(line["ttft"])
        assert float(line["tpot_ms"]) > 0
        assert line["commit"] == "abc"
    assert float(lines[2]["density"]) == 1.0
    assert float(lines[1]["density"]) > 0
    assert "TTFT" in capsys.readouterr().out


def test_batches_may_run_without_prompts(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "engine.csv"
    arguments = arguments_of(folder, path)
    arguments[arguments.index("--tokens") + 1] = ""
    assert main([*arguments, "--held", "--tokenizer", str(CHECKPOINT)])
    assert [line["case"] for line in lines_of(path)] == [
        f"decode {lengths}{how}"
        for lengths in ("1 x 200", "1 x 1,024 + 3 x 50")
        for how in ("", ", sampled", ", sampled and held")
    ]


def test_one_case_without_memory_does_not_end_the_others(
    folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does it keep its pages: the others need them all."""

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError("as the allocator says it")

    monkeypatch.setattr(sparse, "attention", fail)
    path = tmp_path / "engine.csv"
    assert not main(arguments_of(folder, path))
    assert [line["attention"] for line in lines_of(path)] == ["dense"] * 4
    failed = [each for each in capsys.readouterr().out.splitlines() if "OutOfMemory" in each]
    assert any("700" in each for each in failed)
    assert all(each.count("--chunk-tokens") == 1 for each in failed)


def test_long_sequences_of_a_batch_are_cut_to_what_fits() -> None:
    # Each answer of 9 tokens and what is over take a page beside the prompt's.
    assert prompts._shortened([1024, 128], 8, 20) == [1024, 128]
    assert prompts._shortened([1024, 128], 8, 8) == [640, 128]
    assert prompts._shortened([1024, 1024, 50], 8, 12) == [512, 512, 50]


def test_scaling_on_the_pocket_model(
    folder: Path, tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the prompt that meshes are measured with: they are held against it."""
    path, prompt = tmp_path / "scaling.csv", MagicMock(wraps=mesh_rank.random_prompt)
    monkeypatch.setattr(scaling, "random_prompt", prompt)
    assert main([
        "scaling", "--checkpoint", str(folder), "--tokens", "900", "--chunk-tokens", "256",
        "--meshes", "1x1,1x3,2x2", "--csv", str(path), "--link-gbs", "1", "--latency-us", "0",
    ])  # fmt: skip
    lines = lines_of(path)
    assert [asked.args[1:] for asked in prompt.call_args_list] == [(900, 0)] * 3
    assert [line["gpus"] for line in lines] == ["1", "3", "4"]
    assert float(lines[0]["speedup_modelled"]) == 1
    assert float(lines[0]["ttft_modelled"]) == float(lines[0]["compute_modelled"])
    assert "measured" in capsys.readouterr().out


def test_meshes_on_the_pocket_model(folder: Path, tmp_path: Path, capsys) -> None:
    """Over gloo, two processes; their figures are there, and the logits are one process's."""
    path = tmp_path / "mesh.csv"
    assert main([
        "mesh", "--checkpoint", str(folder), "--tokens", "900", "--chunk-tokens", "256",
        "--rank-tokens", "256", "--meshes", "1x1,1x2", "--csv", str(path), "--commit", "abc",
    ])  # fmt: skip
    lines = lines_of(path)
    assert [(line["mesh"], line["chunk_tokens"]) for line in lines] == [
        ("1x1", "256"), ("1x2", "256"), ("1x2", "512"),
    ]  # fmt: skip
    alone, *meshes = lines
    assert alone["efficiency"] == alone["logits_difference"] == ""
    for line in meshes:
        # Two processes on a machine's cores are no two GPUs.
        assert line["efficiency"] == ""
        assert float(line["slowest_communication"]) > 0
    # Only a mesh with the same chunks selects the same.
    assert float(meshes[0]["logits_difference"]) < 0.02
    assert "communi" in capsys.readouterr().out


def test_a_mesh_that_does_not_divide_is_refused_before_any_is_timed(
    folder: Path, tmp_path: Path
) -> None:
    path = tmp_path / "scaling.csv"
    arguments = ["scaling", "--checkpoint", str(folder), "--tokens", "900", "--csv", str(path)]
    with pytest.raises(TensorParallelError) as refused:
        main([*arguments, "--meshes", "1x1,3x2"])
    assert refused.value.possible == (1, 2, 4)
    assert "--meshes" in str(remedied(refused.value))
    assert not path.exists()


def test_chunks_between_the_measured_ones_are_interpolated() -> None:
    # 1, 2, 3 and half of a chunk that starts where the last one measured does.
    assert compute_seconds(350, 100, [0, 200], [1.0, 3.0]) == pytest.approx(1 + 2 + 3 + 1.5)
    assert compute_seconds(50, 100, [0], [1.0]) == 1.0


def test_traffic_is_the_designs() -> None:
    """52.6 GB sent by each of 8 GPUs at 2^20 tokens of the 7B."""
    eight = Traffic.of(QWEN_7B, LoneRank(1, 8, 0), 2**20, 32768, 2)
    assert eight.gathered_bytes == pytest.approx(52.6e9, rel=1e-3)
    assert eight.reduced_bytes == 0
    both = Traffic.of(QWEN_7B, LoneRank(2, 4, 0), 2**20, 32768, 2)
    assert both.gathered_bytes == pytest.approx(60.1e9 / 2 * 3 / 4, rel=1e-3)
    assert both.reduced_bytes == 2 * 27 * 2**20 / 4 * 3584 * 2


def test_a_lone_rank_attends_to_what_all_ranks_would_have_selected(folder: Path) -> None:
    """Whichever rank it is, its rows come out as they do in one process."""
    sparsity = SparsityConfig.from_folder(folder)
    assert sparsity is not None
    sparsity = replace(sparsity, budgets=tuple(
        tuple(HeadBudget(33 + 7 * head, 128) for head in range(4)) for _ in sparsity.budgets
    ))  # fmt: skip
    cpu = torch.device("cpu")
    prompt = np.random.default_rng(0).integers(0, 250, 1024).astype(np.int32)
    seen: dict[int, list[SparseAttention]] = {}
    for rank in (-1, 0, 1):
        mesh = LoneRank(1, 2, rank) if rank >= 0 else Mesh.single()
        model = Qwen2.load(folder, mesh, torch.float32, cpu)
        recorded = Recorded(model.heads)
        if rank >= 0:
            recorded.record([[each.selections] for each in seen[-1]])
        pool = PagePool(model.page_geometry, 8, cpu)
        observer = seen.setdefault(rank, []).append
        prefiller = Prefiller(model, pool, sparsity, observer, recorded.plant)
        prefiller.admit("a", prompt)
        prefiller.run_chunk("a", 0, 1024)
    for rank in (0, 1):
        for ours, whole in zip(seen[rank], seen[-1], strict=True):
            for head in range(4):
                for mine, theirs in zip(
                    ours.selections.of_head(head), whole.selections.of_head(head), strict=True
                ):
                    assert mine.tolist() == theirs.tolist()


def test_decode_over_two_ranks_on_the_pocket_model(folder: Path, tmp_path: Path, capsys) -> None:
    """Over gloo, two processes, which say what one says."""
    path = tmp_path / "span.csv"
    assert main([
        "span", "--checkpoint", str(folder), "--batches", "1x100,2x300", "--decode", "6",
        "--csv", str(path), "--commit", "abc",
    ])  # fmt: skip
    lines = lines_of(path)
    assert [(line["ranks"], line["batch"]) for line in lines] == [
        ("1", "1x100"), ("1", "2x300"), ("2", "1x100"), ("2", "2x300"),
    ]  # fmt: skip
    for alone, both in zip(lines[:2], lines[2:], strict=True):
        assert alone["logprobs_difference"] == alone["same_tokens"] == ""
        # In bfloat16, over few layers.
        assert float(both["logprobs_difference"]) < 0.05
        assert int(both["same_tokens"]) >= int(both["batch"][0])
        floor = float(both["tpot_floor_ms"])
        assert floor == pytest.approx(float(alone["tpot_floor_ms"]) / 2, rel=0.05)
        assert float(both["tpot_over_floor"]) == pytest.approx(
            float(both["tpot_ms"]) / floor, rel=0.5
        )
    assert "logprobs" in capsys.readouterr().out
    with pytest.raises(ConfigurationError):
        main(["span", "--checkpoint", str(folder), "--meshes", "1x2"])
    with pytest.raises(TensorParallelError):
        main(["span", "--checkpoint", str(folder), "--meshes", "3x1"])
