# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""vLLM's Qwen2, whose attention rotates for itself, and knows how long prompts are."""

from typing import Any

import numpy as np
from vllm.config import VllmConfig
from vllm.model_executor.models.qwen2 import Qwen2ForCausalLM
from vllm.v1.worker.gpu.model_states.default import DefaultModelState

from .checks import has_dual_chunks
from .first_runner import give
from .rotary import leave_rotation_to_attention


class LongQwen2ForCausalLM(Qwen2ForCausalLM):
    """As vLLM's own; without Dual Chunk Attention it is just that."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        if has_dual_chunks(vllm_config):
            leave_rotation_to_attention()
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        if has_dual_chunks(vllm_config):
            # vLLM looks whether a loaded model has it, and chooses for itself where it has not: as
            # it must for others of this architecture, of which some generate nothing.
            self.get_model_state_cls = _knowing_prompts


def _knowing_prompts() -> type["KnowsPrompts"]:
    """What vLLM's second model runner keeps of requests."""
    return KnowsPrompts


class KnowsPrompts(DefaultModelState):
    """Keeps the lengths of prompts, and tells builders before they build a step's metadata."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._prompts = np.zeros(self.max_num_reqs, dtype=np.int64)

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)
        self._prompts[req_index] = len(new_req_data.prompt_token_ids)

    def prepare_attn(
        self,
        input_batch: Any,
        cudagraph_mode: Any,
        block_tables: Any,
        slot_mappings: Any,
        attn_groups: Any,
        kv_cache_config: Any,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        give(attn_groups, self._prompts[input_batch.idx_mapping_np])
        return super().prepare_attn(
            input_batch, cudagraph_mode, block_tables, slot_mappings, attn_groups, kv_cache_config,
            *args, **kwargs,
        )  # fmt: skip
