# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""vLLM's first model runner, which asks no model how a step is described.

Its successor does, see `model`. The first is what runs on CPUs, and on GPUs where the successor
lacks something.
"""

from functools import wraps
from typing import Any

import numpy as np
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from .replacing import Function, replace_once

_DESCRIBES = "_build_attention_metadata"
_NOTES = "_bookkeeping_sync"


def hand_over_prompt_lengths() -> None:
    """Have it tell builders how long prompts are, before they build a step's metadata."""
    replace_once(GPUModelRunner, _DESCRIBES, _telling_builders)


def _telling_builders(original: Function) -> Function:
    @wraps(original)
    def describe(runner: Any, *args: Any, **kwargs: Any) -> Any:
        prompts = runner.input_batch.num_prompt_tokens_cpu_tensor.numpy()
        give(runner.attn_groups, prompts)
        return original(runner, *args, **kwargs)

    return describe


def take_draws_back_on_cpus() -> None:
    """Let requests with seeds have prompts that are computed in parts, on CPUs too.

    A part of a prompt draws a token that nobody wants, and the runner takes the draw back by an
    offset, which generators on CPUs have not. Until its prompt is whole a request has drawn nothing
    that counts, so its generator may as well begin anew.
    """
    replace_once(GPUModelRunner, _NOTES, _beginning_anew)


def _beginning_anew(original: Function) -> Function:
    @wraps(original)
    def note(runner: Any, *args: Any, **kwargs: Any) -> Any:
        batch = runner.input_batch
        discarded = np.flatnonzero(runner.discard_request_mask.np[: batch.num_reqs]).tolist()
        aside = {row: batch.generators.pop(row) for row in discarded if row in batch.generators}
        for generator in aside.values():
            generator.manual_seed(generator.initial_seed())
        try:
            return original(runner, *args, **kwargs)
        finally:
            batch.generators.update(aside)

    return note


def give(attention_groups: Any, prompts: Any) -> None:
    """Put the lengths of a step's prompts where the builders that want them find them."""
    for groups in attention_groups:
        for group in groups:
            for builder in group.metadata_builders:
                if hasattr(builder, "prompts"):
                    builder.prompts = prompts
