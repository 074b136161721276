# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""Steps of short sequences alone, which FlashAttention computes as it does for any model.

Within the first dual chunk positions are plain, and so is attention, unless it is sparse.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .model_attention import ModelAttention
from .piece_attention import sparse_rows
from .step_plan import StepPlan


@dataclass(frozen=True)
class PlainSteps:
    """FlashAttention as vLLM brings it, of one version."""

    model: ModelAttention
    version: int

    @classmethod
    def where_there_are(cls, device: torch.device, model: ModelAttention) -> "PlainSteps | None":
        """None without a GPU, or without a FlashAttention for it."""
        if device.type != "cuda":
            return None
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version

        version = get_flash_attn_version(head_size=model.head_dim)
        return None if version is None else cls(model, version)

    def of(self, plan: StepPlan, common: Any) -> "PlainStep | None":
        """A step, if it is one of those. Steps of decodes alone lie in CUDA graphs, and are none.

        Args:
            common: vLLM's metadata.
        """
        stride = self.model.stride
        if not plan.pieces or (stride is not None and plan.longest > stride):
            return None
        if any(sparse_rows(self.model, piece) for piece in plan.pieces):
            return None
        scale = self.model.positions.softmax_scale
        plain, lengths = scale(1), {*plan.lengths, *(piece.length for piece in plan.pieces)}
        if any(scale(length) != plain for length in lengths):
            return None
        return PlainStep(self.version, common, plan.longest)


@dataclass(frozen=True)
class PlainStep:
    """Attention of all rows of a step in one call, as `PlainAttention` wants it.

    `common` is vLLM's metadata, whose lengths and tables FlashAttention reads; `longest` are tokens
    of the longest sequence.
    """

    version: int
    common: Any
    longest: int

    def __call__(self, queries: Tensor, memory: Tensor, scale: float, output: Tensor) -> None:
        """As `PlainAttention`; pages are read where they lie, by their strides."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        k, v = (memory[:, :, which].transpose(1, 2) for which in (0, 1))
        flash_attn_varlen_func(
            q=queries,
            k=k,
            v=v,
            out=output,
            cu_seqlens_q=self.common.query_start_loc,
            max_seqlen_q=self.common.max_query_len,
            seqused_k=self.common.seq_lens,
            max_seqlen_k=self.longest,
            softmax_scale=scale,
            causal=True,
            block_table=self.common.block_table_tensor,
            fa_version=self.version,
        )
