"""Which implementation of a decode step runs."""

from ..kv.pages import PagePool
from ..model.qwen2 import Qwen2
from .portable_step import PortableStep
from .step import DecodeStep


def make_step(model: Qwen2, pool: PagePool, max_batch: int) -> DecodeStep:
    """The step that suits the model's device.

    Raises:
        StepDoesNotFitError: the device's memory does not suffice for a step of `max_batch`.
    """
    if model.device.type == "cuda":
        # Triton is installed where there is a GPU.
        from .graph_step import GraphStep, captured, programs_for, row_counts

        return GraphStep(
            model, pool, row_counts(max_batch), programs_for(model), captured(model.device)
        )
    return PortableStep(model, pool, max_batch)
