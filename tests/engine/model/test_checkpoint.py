"""What a checkpoint folder may be, and what it is told when it is something else."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.errors import CheckpointError, InvalidRequestError
from longreach.engine.local import LocalPrefill
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.sparsity import SparsityConfig
from longreach.kernels.sparse import HeadBudget

from ..checkpoints import DUAL_CHUNK, make_checkpoint

PROMPT = np.arange(50, dtype=np.int32)


@pytest.fixture(scope="module")
def original(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("original"), DUAL_CHUNK, sparse=(100, 200))


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def load(folder: Path) -> Qwen2:
    return Qwen2.load(folder, Mesh.single(), torch.float32, torch.device("cpu"))


def change(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_several_shards_are_one(original: Path, tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path, DUAL_CHUNK, max_shard_size="100KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    expected = LocalPrefill(original, 128).logits(PROMPT)
    torch.testing.assert_close(LocalPrefill(sharded, 128).logits(PROMPT), expected)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    sharded = make_checkpoint(tmp_path, max_shard_size="100KB")
    gone = sorted(sharded.glob("*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(CheckpointError, match=gone.name):
        load(sharded)


def test_a_truncated_file_is_named(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change(folder / "config.json", num_hidden_layers=4)
    with pytest.raises(CheckpointError, match=r"model\.layers\.3"):
        load(folder)


def test_another_shape_is_named_with_both(folder: Path) -> None:
    change(folder / "config.json", intermediate_size=128)
    with pytest.raises(CheckpointError, match=r"\(96, 64\).*\(128, 64\)"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["LlamaForCausalLM"]}, "Qwen2ForCausalLM"),
        ({"use_sliding_window": True}, "sliding"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "yarn"),
        ({"num_key_value_heads": 3}, "evenly"),
        ({"dual_chunk_attention_config": {**DUAL_CHUNK, "local_size": 200}}, "local_size"),
    ],
)
def test_other_models_are_refused(folder: Path, changes: dict, message: str) -> None:
    change(folder / "config.json", **changes)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


def test_a_missing_key_and_a_broken_file_are_named(folder: Path) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text())
    del config["hidden_size"]
    path.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="hidden_size"):
        load(folder)
    path.write_text("{")
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)
    path.unlink()
    with pytest.raises(CheckpointError, match=path.name):
        load(folder)


def test_a_folder_without_weights_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=folder.name):
        load(folder)


def test_published_sparsity_is_read(folder: Path) -> None:
    sparsity = SparsityConfig.from_folder(folder)
    assert sparsity is not None
    assert sparsity.threshold == 32768
    assert sparsity.heads(2, 1, 3) == [HeadBudget(100, 200)] * 2
    (folder / "sparse_attention_config.json").unlink()
    assert SparsityConfig.from_folder(folder) is None


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([], "list of 3 layers"),
        ([{}, {}, {}], "layer 0 has no entry"),
        ([{str(h): ["block_sparse", 1, 1, 1] for h in range(4)}] * 3, "block_sparse"),
    ],
)
def test_sparsity_for_another_model_is_refused(folder: Path, layers: list, message: str) -> None:
    (folder / "sparse_attention_config.json").write_text(json.dumps(layers))
    with pytest.raises(CheckpointError, match=message):
        SparsityConfig.from_folder(folder)


def test_config_reads_what_transformers_writes(folder: Path) -> None:
    config = ModelConfig.from_folder(folder)
    assert config.dual_chunk is not None
    assert config.dual_chunk.stride == 123
    assert config.rope_theta == 10000.0
    assert config.eos_token_ids == (96,)


def test_an_empty_prompt_is_refused(original: Path) -> None:
    with pytest.raises(InvalidRequestError):
        LocalPrefill(original, 128).logits(PROMPT[:0])
