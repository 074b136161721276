"""A model that is served, from its files: which class it is, and which weights it gets."""

import torch

from ..parallel.mesh import Mesh
from ..text.tokenizer import count_ids
from .config import ModelConfig, WeightFormat
from .files import ModelFiles
from .qwen2 import Qwen2
from .random_weights import RandomWeights


def load_model(
    files: ModelFiles,
    mesh: Mesh,
    dtype: torch.dtype,
    device: torch.device,
    seed: int = 0,
    weights: WeightFormat = "auto",
) -> Qwen2:
    """This rank's shard of a model that is served, read or made up.

    Rows of a checkpoint's vocabulary beyond its tokenizer's ids are no tokens. A random model keeps
    all of its rows: it is there to cost what the model costs, and the bundled tokenizer, which
    stands in for its own, knows but a few of its ids.

    Args:
        seed: of random weights.
        weights: as `Qwen2.from_weights`.

    Raises:
        CheckpointError: not a whole Qwen2 checkpoint, or one without a tokenizer.
        TensorParallelError: the mesh does not divide the model.
        ConfigurationError: weights are of 8 bits, and cannot be used here.
    """
    config = ModelConfig.from_folder(files.folder)
    # What is quickly found to be wrong is said before the weights are read.
    config.check_tensor_parallel(mesh.tensor_parallel)
    if files.random:
        source = RandomWeights(seed, dtype, device)
        return Qwen2.from_weights(config, source, mesh, dtype, device, weights)
    num_tokens = count_ids(files.tokenizer_folder)
    return Qwen2.load(files.folder, mesh, dtype, device, weights).with_tokens(num_tokens)
