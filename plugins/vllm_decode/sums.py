"""How vLLM sums over the ranks of a decode worker: by NCCL on GPUs, and in no other way.

Its other ways have each process see the others' devices, and ours see their own alone. FlashInfer's
and torch's symmetric memory ask the switches between GPUs for multicast as well.
"""

import os
from typing import Any

OPTIONS: dict[str, Any] = {
    "disable_custom_all_reduce": True,
    "compilation_config": {"pass_config": {"fuse_allreduce_rms": False}},
}
"""That vLLM's leading rank is started with, where there are several."""


def leave_symmetric_memory_out() -> None:
    """On each rank, before it meets the others: vLLM has no option for it."""
    os.environ["VLLM_ALLREDUCE_USE_SYMM_MEM"] = "0"
