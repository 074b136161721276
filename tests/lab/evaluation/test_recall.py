"""Recall against the definition, and budgets that grow until it is enough."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from typer.testing import CliRunner

from longreach.engine.messages import Tokens
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels.dual_chunk import reference
from longreach.kernels.sparse import FORCED_VERTICALS, HeadBudget
from longreach.kernels.sparse.reference import visible
from longreach.lab.evaluation.calibration import Round, grow_budgets, uniform
from longreach.lab.evaluation.cli import app
from longreach.lab.evaluation.recall import RecallMeter, measure

from ...engine.checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint

LENGTH = 930


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dual"), DUAL_CHUNK, sparse=(30, 128))


@pytest.fixture(scope="module")
def model(folder: Path) -> Qwen2:
    return Qwen2.load(folder, Mesh.single(), torch.float32, torch.device("cpu"))


def prompt() -> Tokens:
    return np.random.default_rng(1).integers(0, VOCAB, LENGTH).astype(np.int32)


def measured(model: Qwen2, verticals: int, slashes: int, chunk_tokens: int) -> RecallMeter:
    return measure(model, uniform(model, verticals, slashes), [prompt()], chunk_tokens)


def first_layers_attention(folder: Path) -> Tensor:
    """float64 [heads, n, n], by the definition."""
    config = ModelConfig.from_folder(folder)
    weights = {name: w.double() for name, w in load_file(folder / "model.safetensors").items()}
    hidden = weights["model.embed_tokens.weight"][torch.from_numpy(prompt()).long()]
    normed = hidden / (hidden.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt()
    normed = normed * weights["model.layers.0.input_layernorm.weight"]
    q, k = (
        (
            normed @ weights[f"model.layers.0.self_attn.{name}_proj.weight"].T
            + weights[f"model.layers.0.self_attn.{name}_proj.bias"]
        ).view(LENGTH, -1, config.head_dim)
        for name in "qk"
    )
    relative = reference.relative_positions(LENGTH, 200, 77)
    temperature = 0.1 * np.log(LENGTH / 200) + 1
    scale = config.head_dim**-0.5 * temperature**2
    return reference.scores(q, k, relative, config.rope_theta, scale).softmax(-1)


@pytest.mark.parametrize("chunk_tokens", [256, 896, 1024])
def test_recall_is_the_attention_that_falls_on_visible_keys(
    folder: Path, model: Qwen2, chunk_tokens: int
) -> None:
    """The smallest budgets choose what is always chosen, so that nothing depends on selection.

    Of 930 tokens in chunks of 896, the second chunk has fewer queries than count as the last.
    """
    seen = visible(set(range(FORCED_VERTICALS)), {0, 1}, LENGTH)
    expected = (first_layers_attention(folder) * seen).sum(-1).T.float()
    meter = measured(model, FORCED_VERTICALS, 128, chunk_tokens)
    torch.testing.assert_close(meter.rows(0), expected, atol=1e-3, rtol=1e-3)
    heads = [each for each in meter.heads() if each.layer == 0]
    means = expected.mean(0).tolist()
    assert [each.mean for each in heads] == pytest.approx(means, abs=1e-3)
    assert min(means) < 0.9
    last = expected[-64:].mean(0).tolist()
    assert [each.last for each in heads] == pytest.approx(last, abs=1e-3)


def test_nothing_is_lost_with_budgets_for_everything(model: Qwen2) -> None:
    meter = measured(model, LENGTH, LENGTH + 128, 256)
    assert {each.layer for each in meter.heads()} == {0, 1}, "the last layer selects nothing"
    assert min(each.lowest for each in meter.heads()) > 0.999


def test_budgets_grow_where_recall_is_low_and_only_there(model: Qwen2) -> None:
    rounds: list[Round] = []
    start = uniform(model, 30, 128)
    found = grow_budgets(model, start, [prompt()], 0.9, HeadBudget(1024, 1024), 256, rounds.append)
    assert rounds[0].wanting
    assert rounds[-1].wanting == ()
    assert rounds[-1].sparsity == found
    wanted = {(each.layer, each.head) for done in rounds for each in done.wanting}
    for layer, budgets in enumerate(found.budgets):
        for head, budget in enumerate(budgets):
            old = start.budgets[layer][head]
            if (layer, head) in wanted:
                assert budget.verticals > old.verticals
                assert budget.slashes > old.slashes
            else:
                assert budget == old


def test_budgets_stop_at_the_most_that_is_allowed(model: Qwen2) -> None:
    most = HeadBudget(48, 256)
    found = grow_budgets(model, uniform(model, 30, 128), [prompt()], 1.0, most, 256, lambda _: None)
    assert set(found.budgets[0]) == {most}
    assert set(found.budgets[-1]) == {HeadBudget(30, 128)}


def call(*arguments: str) -> str:
    done = CliRunner().invoke(app, arguments, env={"COLUMNS": "120"})
    assert done.exit_code == 0, done.output
    return done.output


def test_the_commands_write_a_table_a_picture_and_a_config(tmp_path: Path) -> None:
    output = call("recall", "--length", "3K", "--prompts", "1", "--out", str(tmp_path))
    written = json.loads((tmp_path / "recall.json").read_text())
    assert (written["prompts"], written["tokens"], len(written["heads"])) == (1, 3072, 16)
    assert all(f"{each['mean']:.4f}" in output for each in written["heads"])
    assert (tmp_path / "recall.png").read_bytes().startswith(b"\x89PNG")
    output = call(
        "calibrate", "--length", "3K", "--start", "30,128", "--most", "64,256",
        "--threshold", "0.99", "--out", str(tmp_path),
    )  # fmt: skip
    assert re.search(r"\d+ of 16 heads are under 0.99", output)
    written = json.loads((tmp_path / "sparse_attention_config.json").read_text())
    assert len(written) == 5
    grown = [
        f"layer {layer}, head {head}: verticals 30 to {entry[1]}, slashes 128 to {entry[2]}"
        for layer, heads in enumerate(written)
        for head, entry in heads.items()
        if entry[1] > 30
    ]
    assert grown
    assert all(line in output for line in grown)


def test_text_of_ones_own(tmp_path: Path) -> None:
    book = tmp_path / "book.txt"
    book.write_text("Call me Ishmael. " * 100)
    call("recall", "--length", "1K", "--text", str(book), "--out", str(tmp_path))
    done = CliRunner().invoke(app, ["recall", "--length", "1M", "--text", str(book)])
    assert "has 1700 tokens" in str(done.exception)
