"""Meets every kind of prefill chunk before the first request does.

Kernels are compiled for a GPU when they are first launched, in several versions: without this, the
first long prompt would wait for some of them at every border of a dual chunk.
"""

import numpy as np

from .prefiller import Prefiller

_NAME = "warm-up"


def warm_up_prefill(
    prefiller: Prefiller, longest: int, chunk_tokens: int, stride: int | None
) -> None:
    """Compute a few chunks, as of a short prompt and of one of `longest` tokens; collective.

    Pages for `longest` tokens must be free, and are again afterwards; what they hold is no prompt.

    Args:
        stride: tokens of one dual chunk, None for plain positions.
    """
    _run(prefiller, min(chunk_tokens, longest), [0], chunk_tokens)
    _run(prefiller, longest, _kinds_of_chunks(longest, chunk_tokens, stride), chunk_tokens)


def _kinds_of_chunks(longest: int, chunk_tokens: int, stride: int | None) -> list[int]:
    """Where chunks begin: the first, the last, and those on and behind a border of dual chunks."""
    starts = {0, (longest - 1) // chunk_tokens * chunk_tokens}
    for border in () if stride is None else (stride, 2 * stride):
        first = border // chunk_tokens * chunk_tokens
        starts |= {first, first + chunk_tokens, first + 2 * chunk_tokens}
    return sorted(start for start in starts if start < longest)


def _run(prefiller: Prefiller, length: int, starts: list[int], chunk_tokens: int) -> None:
    prompt = np.zeros(length, dtype=np.int32)
    for start in starts:
        prefiller.admit(_NAME, prompt, done=start)
        try:
            prefiller.run_chunk(_NAME, start, min(start + chunk_tokens, length))
        finally:
            prefiller.release(_NAME)
