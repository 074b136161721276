"""Errors that say that a device's memory ran out, from whatever raises them, made one of ours."""

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from ..errors import LongreachError, OutOfMemoryError

_SAYS_SO = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""What errors say that come from beside PyTorch's allocator: CUDA itself, Triton, and cuBLAS."""


@contextmanager
def out_of_memory_raises(error: LongreachError) -> Iterator[None]:
    """Raise `error` where the device's memory does not suffice for what is done within.

    Whoever keeps the error does not keep with it what was allocated by calls that are over.
    """
    try:
        yield
    except Exception as cause:
        if not _is_out_of_memory(cause):
            raise
        traceback.clear_frames(cause.__traceback__)
        raise error from cause


def _is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, OutOfMemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(each in str(error) for each in _SAYS_SO)
