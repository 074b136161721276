# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""The rotary embedding that vLLM's models call: it leaves queries and keys as they are.

A query has three rotations here, and which of them count is known to attention alone, where K is
rotated as it is written into its page. vLLM's own makes five of every query, and wants CUDA.
"""

from typing import Any

from torch import Tensor
from vllm.model_executor.custom_op import CustomOp, op_registry_oot
from vllm.model_executor.layers.rotary_embedding.dual_chunk_rope import DualChunkRotaryEmbedding

_NAME = DualChunkRotaryEmbedding.__name__


class RotatedInAttention(DualChunkRotaryEmbedding):
    """Takes what vLLM's takes, and gives back what it is given."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        CustomOp.__init__(self)

    def forward_native(
        self, positions: Tensor, query: Tensor, key: Tensor, offsets: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """The same on every device."""
        return query, key

    def extra_repr(self) -> str:
        return "rotated in attention"


def leave_rotation_to_attention() -> None:
    """Have vLLM take this one wherever it would take its own."""
    if _NAME not in op_registry_oot:
        CustomOp.register_oot(RotatedInAttention, name=_NAME)
