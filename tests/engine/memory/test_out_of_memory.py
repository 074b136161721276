"""Which errors say that a device's memory ran out, and what is kept alive by those that do."""

import weakref

import pytest
import torch

from longreach.engine.errors import ConfigurationError, OutOfMemoryError
from longreach.engine.memory.out_of_memory import out_of_memory_raises


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("as the allocator says it"),
        OutOfMemoryError("as a chunk says it"),
        torch.AcceleratorError("CUDA error: out of memory\nCompile with ..."),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("Triton Error [CUDA]: out of memory"),
    ],
    ids=["allocator", "chunk", "device", "cublas", "triton"],
)
def test_running_out_of_memory_keeps_nothing_alive(error: Exception) -> None:
    seen: list[weakref.ref[torch.Tensor]] = []

    def allocate() -> None:
        allocated = torch.zeros(3)
        seen.append(weakref.ref(allocated))
        raise error

    with (
        pytest.raises(ConfigurationError) as raised,
        out_of_memory_raises(instead := ConfigurationError("too large")),
    ):
        allocate()
    assert raised.value is instead
    assert raised.value.__cause__ is error
    assert [reference() for reference in seen] == [None]


@pytest.mark.parametrize(
    "error",
    [
        ZeroDivisionError("out of memory"),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate()`"),
    ],
    ids=["python", "device", "cublas"],
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with (
        pytest.raises(type(error)) as raised,
        out_of_memory_raises(ConfigurationError("too large")),
    ):
        raise error
    assert raised.value is error
