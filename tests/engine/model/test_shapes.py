"""Shapes of real models, and random weights in place of theirs."""

from pathlib import Path

import pytest
import torch

from longreach.engine.errors import CheckpointError
from longreach.engine.kv.pages import PageGeometry, PagePool
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.files import ModelFiles
from longreach.engine.model.load import load_model
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.model.random_weights import RandomWeights
from longreach.engine.model.shapes import known_shapes
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.prefill.sparsity import SparsityConfig
from longreach.engine.text.tokenizer import Tokenizer
from longreach.kernels.page_size import PAGE_TOKENS, pages_for

from ...processes import run_ranks

CPU = torch.device("cpu")
LENGTH = 700


@pytest.mark.parametrize(
    ("name", "parameters", "kv_bytes"),
    [("qwen2.5-7b-1m", 7.616e9, 57_344), ("qwen2.5-14b-1m", 14.77e9, 196_608)],
)
def test_shapes_are_the_published_sizes(name: str, parameters: float, kv_bytes: int) -> None:
    files = ModelFiles.of(f"random/{name}")
    config = ModelConfig.from_folder(files.folder)
    hidden, kv_width = config.hidden_size, config.num_kv_heads * config.head_dim
    layer = 2 * hidden * (hidden + kv_width) + 3 * hidden * config.intermediate_size
    counted = config.num_layers * layer + 2 * config.vocab_size * hidden
    assert counted == pytest.approx(parameters, rel=1e-3)
    heads = (config.num_layers, config.num_kv_heads, config.head_dim)
    assert PageGeometry(*heads, torch.bfloat16).bytes_per_page == PAGE_TOKENS * kv_bytes
    assert config.dual_chunk is not None
    assert config.dual_chunk.stride == 253_952
    sparsity = SparsityConfig.from_folder(files.folder)
    assert sparsity is not None
    assert len(sparsity.budgets) == config.num_layers
    assert Tokenizer(files.tokenizer_folder).vocab_size <= config.vocab_size


def test_the_published_budgets_of_the_7b() -> None:
    sparsity = SparsityConfig.from_folder(known_shapes()["qwen2.5-7b-1m"])
    assert sparsity is not None
    every = [head for layer in sparsity.budgets for head in layer]
    assert sum(head.verticals for head in every) / len(every) == pytest.approx(3920, abs=1)
    assert sum(head.slashes for head in every) / len(every) == pytest.approx(7650, abs=1)


def test_an_unknown_shape_is_refused_with_those_that_are_known() -> None:
    with pytest.raises(CheckpointError, match=r"random/qwen2\.5-14b-1m, random/qwen2\.5-7b-1m"):
        ModelFiles.of("random/qwen2.5-72b")


def test_a_tensor_is_the_same_in_slices_and_with_every_seed_another() -> None:
    source = RandomWeights(3, torch.float32, CPU)
    name, shape = "model.layers.0.self_attn.o_proj.weight", (30, 50)
    whole = source.read(name, shape)
    torch.testing.assert_close(source.read(name, shape, slice(7, 19)), whole[7:19])
    torch.testing.assert_close(source.read(name, shape, slice(7, 19), 1), whole[:, 7:19])
    assert not torch.equal(whole, RandomWeights(4, torch.float32, CPU).read(name, shape))
    assert not torch.equal(whole, source.read("model.layers.1.self_attn.o_proj.weight", shape))
    assert torch.equal(source.read("model.norm.weight", (9,)), torch.ones(9))


def logits_of(mesh: Mesh) -> torch.Tensor:
    """Of a prompt, by the pocket model's shape with random weights."""
    model = load_model(ModelFiles(CHECKPOINT, CHECKPOINT, random=True), mesh, torch.float32, CPU)
    pool = PagePool(model.page_geometry, pages_for(LENGTH), CPU)
    pool.memory.fill_(torch.nan)
    prefiller = Prefiller(model, pool, None)
    prefiller.admit("a", (torch.arange(LENGTH) % 250).int().numpy())
    prefiller.run_chunk("a", 0, 384)
    logits = prefiller.run_chunk("a", 384, LENGTH).logits
    assert logits is not None
    return logits


def rank_main(rank: int, tensor: int, sequence: int, output: Path) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.join(tensor, sequence, rank, f"file://{output}/meeting-{tensor}")
    torch.save(logits_of(mesh), output / f"{tensor}-{rank}.pt")
    mesh.close()


@pytest.mark.parametrize(("tensor", "sequence"), [(2, 1), (1, 2)])
def test_every_mesh_has_the_same_random_model(tensor: int, sequence: int, tmp_path: Path) -> None:
    run_ranks(rank_main, (tensor, sequence, tmp_path), 2)
    expected = logits_of(Mesh.single())
    assert expected.std() > 0.1
    for rank in range(2):
        logits = torch.load(tmp_path / f"{tensor}-{rank}.pt")
        torch.testing.assert_close(logits, expected, rtol=3e-4, atol=3e-4)


def test_hidden_states_stay_finite_through_as_many_layers_as_the_14b_has() -> None:
    config = ModelConfig(97, 64, 96, 48, 4, 2, 16, 1e-5, 1e7, False, 4096, None, ())
    source = RandomWeights(0, torch.bfloat16, CPU)
    model = Qwen2.from_weights(config, source, Mesh.single(), torch.bfloat16, CPU)
    pool = PagePool(model.page_geometry, 2, CPU)
    prefiller = Prefiller(model, pool, None)
    prefiller.admit("a", (torch.arange(200) % 97).int().numpy())
    logits = prefiller.run_chunk("a", 0, 200).logits
    assert logits is not None
    assert 0.3 < logits.std() < 3
