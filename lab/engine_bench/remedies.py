"""Which option helps where the engine says what is wrong."""

from ...engine import errors
from ...engine.errors import LongreachError

FEWER_TOKENS = "lower --chunk-tokens or --tokens, or take --kv-cache fp8"
FEWER_SEQUENCES = "take fewer sequences, or --kv-cache fp8"

_SMALLER = "a smaller --chunk-tokens, a smaller --shape, or a larger GPU"


def remedied(error: LongreachError) -> LongreachError:
    """The same error, which says the option that helps, where one does."""
    return error.with_remedy(_remedy_of(error))


def _remedy_of(error: LongreachError) -> str | None:
    match error:
        case errors.DoesNotFitError():
            fewer = [] if error.largest_cache == 0 else ["fewer --tokens"]
            if error.largest_cache and not error.needs.quantized:
                fewer.append("--kv-cache fp8, whose pages are half as large")
            if not error.needs.narrow:
                fewer.append("--weights fp8, which halves those of all layers")
            return f"take {', '.join([*fewer, _SMALLER])}"
        case errors.TensorParallelError():
            possible = ", ".join(map(str, error.possible))
            return f"in --meshes, begin with one of {possible}, or take more sequence parallel"
        case errors.StepDoesNotFitError():
            return FEWER_SEQUENCES
        case errors.OutOfMemoryError():
            return FEWER_TOKENS
        case _:
            return None
