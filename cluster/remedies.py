"""Which setting helps where the engine says what is wrong.

The engine's errors carry numbers and know no settings. They cross from process to process as they
were raised, and get their remedy where somebody reads them: in an answer (`rest.errors`), in what a
process says at its start (`memory`), on the command line (`cli.main`), and where an error becomes a
part of another one's sentence (`in_one_line`).
"""

from typing import TypeVar

from ..engine import errors
from ..engine.errors import LongreachError, Phase

E = TypeVar("E", bound=BaseException)

_ANOTHER_WAY = "set transport.kind: object_store"


def remedied(error: E, gpus: float = 1.0) -> E:
    """The same error; one of ours says which setting helps, where one does.

    Args:
        gpus: that the process which raised it asks for; below 1 it shares one.
    """
    if isinstance(error, LongreachError):
        error.with_remedy(remedy_of(error, gpus))
    return error


def in_one_line(error: BaseException) -> str:
    """What an error says, for the sentence of another one, which then names the remedy."""
    return errors.in_one_line(remedied(errors.innermost(error)))


def remedy_of(error: LongreachError, gpus: float = 1.0) -> str | None:
    """What an operator may set differently, or a client ask for; None where that is nothing."""
    match error:
        case errors.DoesNotFitError() if error.largest_cache == 0:
            return _any_of(*_narrower(error.needs), *_smaller(error.needs.phase, gpus))
        case errors.DoesNotFitError() | errors.LoadingOutOfMemoryError():
            return _more_room(error.needs, gpus)
        case errors.StepDoesNotFitError():
            return "lower decode.kv_cache_tokens, decode.max_batch or decode.prefill_alone"
        case errors.ChunkOutOfMemoryError():
            return "lower prefill.chunk_tokens or prefill.kv_cache_tokens"
        case errors.DecodeOutOfMemoryError() | errors.ReceiveOutOfMemoryError():
            return "lower decode.max_batch, decode.prefill_alone or decode.kv_cache_tokens"
        case errors.CacheTooSmallError(phase="prefill"):
            return "shorten the prompt, or raise prefill.kv_cache_tokens"
        case errors.CacheTooSmallError():
            return "shorten the prompt, max_tokens or n, or raise decode.kv_cache_tokens"
        case errors.TensorParallelError():
            possible = ", ".join(map(str, error.possible))
            return (
                f"make prefill.tensor_parallel one of {possible}, or raise "
                "prefill.sequence_parallel instead"
            )
        case errors.WeightFormatError():
            return (
                "take the model's checkpoint in bfloat16, with model.weights: fp8 if they shall be "
                "of 8 bits"
            )
        case errors.NarrowComputeError():
            return "set model.dtype bfloat16, or take weights of more bits"
        case errors.NoNarrowProductsError():
            return "leave model.weights out, or take a checkpoint of more bits"
        case errors.DividedBlockError():
            return (
                "lower prefill.tensor_parallel or decode.tensor_parallel, whichever divides it; "
                "prefill.sequence_parallel may be raised instead"
            )
        case errors.MixedPrecisionError():
            return f"set model.dtype {error.pages}, or leave model.kv_cache_dtype out"
        case errors.PageFormatError():
            return "give both sides the same model.dtype and model.kv_cache_dtype"
        case errors.RefusedPagesError():
            return remedy_of(error.reason, gpus)
        case errors.OtherHostError() | errors.CannotSharePagesError():
            return f"{_ANOTHER_WAY} or nixl"
        case errors.NoNixlError():
            return (
                f"pip install '.[nixl]' in a clone of Longreach, on every node, or {_ANOTHER_WAY}"
            )
        case errors.NoVllmError():
            return (
                "pip install '.[vllm]' 'vllm==0.26.*' in a clone of Longreach, on every node, "
                "or set decode.engine: native"
            )
        case errors.CannotReachPagesError():
            return _ANOTHER_WAY
        case errors.CannotMapPagesError():
            return f"if the rank is alive, {_ANOTHER_WAY}"
        case _:
            return None


def _more_room(needs: errors.MemoryNeeds, gpus: float) -> str:
    """What makes room for pages, which may be of 8 bits already."""
    narrow = "model.kv_cache_dtype fp8_e4m3, whose pages are half as large"
    return _any_of(
        f"fewer {needs.phase}.kv_cache_tokens",
        *(() if needs.quantized else (narrow,)),
        *_narrower(needs),
        *_smaller(needs.phase, gpus),
    )


def _narrower(needs: errors.MemoryNeeds) -> tuple[str, ...]:
    """What makes weights smaller, which may be of 8 bits already."""
    return () if needs.narrow else ("model.weights fp8, which halves those of all layers",)


def _smaller(phase: Phase, gpus: float) -> tuple[str, ...]:
    """What makes room for weights and for computing."""
    if phase == "prefill":
        own = "a smaller prefill.chunk_tokens", "a larger prefill.tensor_parallel"
        alone = "a GPU of its own (prefill.gpus_per_rank 1)"
    else:
        own = (
            "a smaller decode.max_batch or decode.prefill_alone",
            "a larger decode.tensor_parallel",
        )
        alone = "a GPU of its own (decode.gpus 1)"
    return *own, "a larger GPU", *(() if gpus >= 1 else (alone,))


def _any_of(*things: str) -> str:
    """As a list after "take"."""
    return f"take {', '.join(things[:-1])}, or {things[-1]}"
