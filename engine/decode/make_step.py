"""Which implementation of a decode step runs."""

from ..kv.pages import PagePool
from ..model.qwen2 import Qwen2
from .portable_step import PortableStep
from .step import NO_PROMPTS, DecodeStep, PromptLimits
from .step_rows import row_counts


def make_step(
    model: Qwen2, pool: PagePool, max_batch: int, prompts: PromptLimits = NO_PROMPTS
) -> DecodeStep:
    """The step that suits the model's device.

    Args:
        prompts: which it computes.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for a step of `max_batch`.
    """
    if model.device.type == "cuda":
        # Triton is installed where there is a GPU.
        from .graph_step import GraphStep, captured, programs_for

        return GraphStep(
            model, pool, row_counts(max_batch), programs_for(model), captured(model.device),
            prompts,
        )  # fmt: skip
    return PortableStep(model, pool, max_batch)
