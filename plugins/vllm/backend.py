# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""The attention backend, as vLLM takes one: pages, a step's metadata, a layer's attention."""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.version import __version__

from ...kernels.page_size import PAGE_TOKENS
from .checks import BACKEND, check, raw_config
from .decode_rows import DecodeInputs, DecodeRows, PortableDecodeRows
from .errors import OtherPagesError, UntoldError
from .first_runner import hand_over_prompt_lengths
from .flash import PlainSteps
from .model_attention import ModelAttention
from .piece_attention import PieceAttention, table_of
from .prompt_lengths import prompt_lengths
from .step_attention import StepAttention
from .step_plan import Integers, StepPlan
from .warm_up import warm_up

_NOTHING_SAID: Integers = np.zeros(0, dtype=np.int64)


class DualChunkBackend(AttentionBackend):
    """Dual Chunk Attention over pages of 128 tokens, head-major."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        return BACKEND

    @staticmethod
    def get_impl_cls() -> type["DualChunkImpl"]:
        return DualChunkImpl

    @staticmethod
    def get_builder_cls() -> type["DualChunkMetadataBuilder"]:
        return DualChunkMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int]:
        return [PAGE_TOKENS]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return [64, 128]

    @staticmethod
    def get_kv_cache_shape(
        num_blocks: int,
        block_size: int,
        num_kv_heads: int,
        head_size: int,
        cache_dtype_str: str = "auto",
    ) -> tuple[int, ...]:
        """For vLLM before 0.29, in which `supported_kv_cache_layouts` takes its place."""
        return num_blocks, num_kv_heads, 2, block_size, head_size

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[Any, ...]:
        """For 0.29 and later: a layer's pages lie one after another, head-major.

        What such a page holds of a head, 128 times K and V of a token, has the size of ours.
        """
        from vllm.v1.kv_cache_layout import KVCacheLayout

        return (KVCacheLayout.LBHNC,)


@dataclass
class DualChunkMetadata(AttentionMetadata):
    """What vLLM hands to each layer's attention in a step: the step, which all of them share."""

    step: StepAttention


class DualChunkMetadataBuilder(AttentionMetadataBuilder[DualChunkMetadata]):
    """Plans steps. Whoever runs the model puts `prompts` there first: of each sequence of the
    step, in its order, the tokens of its prompt."""

    _cudagraph_support: ClassVar = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE

    def __init__(
        self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: Any
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        layers = vllm_config.compilation_config.static_forward_context
        impl = layers[layer_names[0]].impl
        self._model: ModelAttention = impl.model
        self.prompts = _NOTHING_SAID
        self._inputs: DecodeInputs | None = None
        # Before anything is captured: graphs hold the address of what this makes.
        self._model.positions.key_rotation(torch.zeros(1, dtype=torch.int64, device=device))
        self._plain = PlainSteps.where_there_are(device, self._model)
        if device.type == "cuda":
            from ...kernels.dual_chunk.triton_decode import programs_per_kv_head

            programs = programs_per_kv_head(self._model.num_kv_heads, device)
            most = vllm_config.scheduler_config.max_num_seqs
            self._inputs = DecodeInputs(self._model, most, programs, device)
            model_config = vllm_config.model_config
            warm_up(self._model, model_config.max_model_len, model_config.dtype, device)
        if not vllm_config.use_v2_model_runner:
            hand_over_prompt_lengths()

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> DualChunkMetadata:
        """What a step is, from what vLLM says of it.

        Raises:
            UnknownPromptError: it never said how long a prompt is that is computed.
        """
        common = common_attn_metadata
        ends = np.asarray(common.seq_lens_cpu_upper_bound)
        first_rows = np.asarray(common.query_start_loc_cpu)[: len(ends) + 1]
        prompts = prompt_lengths(self.prompts, first_rows, common.slot_mapping)
        # What was said is of this step: another's sequences must not be taken for these.
        self.prompts = _NOTHING_SAID
        plan = StepPlan.of(first_rows, ends, prompts)
        tables, positions = common.block_table_tensor, common.positions
        plain = None if self._plain is None else self._plain.of(plan, common)
        if plain is None:
            decodes = self._decodes(plan, tables) if plan.ends else None
            pieces = self._pieces(plan, tables, positions)
        else:
            decodes, pieces = None, []
        return DualChunkMetadata(
            StepAttention(
                self._model, plan.rows, positions, common.slot_mapping, decodes, pieces, plain
            )
        )

    def _pieces(self, plan: StepPlan, tables: Tensor, positions: Tensor) -> list[PieceAttention]:
        return [
            PieceAttention(
                self._model, piece, table_of(tables, piece.sequence), positions[piece.rows]
            )
            for piece in plan.pieces
        ]

    def _decodes(self, plan: StepPlan, tables: Tensor) -> DecodeRows:
        if self._inputs is None:
            return PortableDecodeRows(self._model, plan, tables)
        return self._inputs.fill(plan, tables)


class DualChunkImpl(AttentionImpl[DualChunkMetadata]):
    """One layer's attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        layer_idx: int | None = None,
        dual_chunk_attention_config: dict[str, Any] | None = None,
    ) -> None:
        # Of architectures that nobody registered vLLM asks nobody before it loads them.
        config = get_current_vllm_config()
        check(config, __version__)
        if layer_idx is None:
            raise UntoldError("layer_idx")
        if num_kv_heads is None:
            raise UntoldError("num_kv_heads")
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self._layer = layer_idx
        rank = get_tensor_model_parallel_rank()
        self.model = ModelAttention.of(raw_config(config), num_heads, num_kv_heads, rank)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: DualChunkMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Queries and keys come as they were projected: nothing rotated them; see `rotary`."""
        if attn_metadata is None:
            # vLLM looks at how much memory the rest of the model takes.
            return output.fill_(0)
        memory = as_pages(kv_cache, self.num_kv_heads, self.head_size)
        attn_metadata.step.attend(self._layer, query, key, value, memory, output)
        return output


def as_pages(kv_cache: Tensor, num_kv_heads: int, head_size: int) -> Tensor:
    """One layer of vLLM's cache as pages [pages, kv_heads, 2, 128, d]; no copy.

    Raises:
        OtherPagesError: they cannot be had from it without one.
    """
    pages = (-1, num_kv_heads, 2, PAGE_TOKENS, head_size)
    try:
        return kv_cache.view(pages)
    except RuntimeError as error:
        shape, strides = tuple(kv_cache.shape), kv_cache.stride()
        raise OtherPagesError(shape, strides, pages) from error
