"""What is measured: a model, its pages, and how its prompts are cut."""

from dataclasses import dataclass

import numpy as np
import torch

from ...engine.decode.detokenizer import TokenBytes
from ...engine.kv.pages import PageGeometry, PagePool
from ...engine.messages import Tokens
from ...engine.model.config import ModelConfig, WeightFormat
from ...engine.model.files import ModelFiles
from ...engine.model.heads import RankHeads
from ...engine.model.load import load_model
from ...engine.model.qwen2 import Qwen2
from ...engine.parallel.mesh import Mesh
from ...engine.prefill.sparsity import SparsityConfig
from ...engine.text.tokenizer import Tokenizer
from ...kernels.page_size import pages_for

KV_CACHE_TYPES = {"bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}


@dataclass(frozen=True)
class Subject:
    """Prefill and decode share the model and one pool of pages."""

    model: Qwen2
    pool: PagePool
    sparsity: SparsityConfig | None
    token_bytes: TokenBytes
    chunk_tokens: int
    seed: int

    @classmethod
    def of(
        cls,
        files: ModelFiles,
        model: Qwen2,
        kv_cache: str,
        tokens: int,
        chunk_tokens: int,
        seed: int,
    ) -> "Subject":
        """With pages for so many tokens, zeroed: decode alone reads what nothing wrote."""
        pool = PagePool(page_geometry(model.config, kv_cache), pages_for(tokens), model.device)
        pool.clear()
        return cls(
            model, pool, SparsityConfig.from_folder(files.folder),
            TokenBytes(Tokenizer(files.tokenizer_folder).raw), chunk_tokens, seed,
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where everything lies."""
        return self.model.device

    def prompt(self, tokens: int) -> Tokens:
        """Seeded random tokens."""
        return _random_tokens(self.model.config, tokens, self.seed)

    def is_sparse(self, tokens: int) -> bool:
        """Whether budgets apply to prompts of this length."""
        return self.sparsity is not None and tokens > self.sparsity.threshold


def random_prompt(files: ModelFiles, tokens: int, seed: int) -> Tokens:
    """As a subject's, wherever the model is."""
    return _random_tokens(ModelConfig.from_folder(files.folder), tokens, seed)


def _random_tokens(config: ModelConfig, tokens: int, seed: int) -> Tokens:
    return np.random.default_rng([seed, tokens]).integers(
        0, config.vocab_size, tokens, dtype=np.int32
    )


def page_geometry(config: ModelConfig, kv_cache: str, tensor_parallel: int = 1) -> PageGeometry:
    """Of one tensor rank's pages in one of KV_CACHE_TYPES; each has as many heads.

    Raises:
        TensorParallelError: the ranks do not divide the model.
    """
    heads = RankHeads.of(config, tensor_parallel, 0)
    return PageGeometry(
        config.num_layers, heads.num_kv_heads, config.head_dim, KV_CACHE_TYPES[kv_cache]
    )


def load(files: ModelFiles, device: torch.device, seed: int, kept: WeightFormat) -> Qwen2:
    """The whole model in bfloat16; what making it up left behind goes back to the device."""
    model = load_model(files, Mesh.single(), torch.bfloat16, device, seed, kept)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return model


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has done what it was given; a CPU has."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
