"""The type that a model computes in, where that is left to the machine."""

import pytest
import torch

from longreach.engine.errors import MixedPrecisionError
from longreach.engine.kv.formats import dtype_name
from longreach.engine.local import LocalPrefill
from longreach.engine.model.compute_type import compute_dtype
from longreach.engine.model.pocket import CHECKPOINT

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("capability", "multiplies", "expected"),
    [
        ("DEFAULT", False, torch.float32),
        ("AVX2", False, torch.float32),
        ("AVX512", False, torch.float32),
        ("AVX512", True, torch.bfloat16),
        ("AVX2", True, torch.float32),
    ],
)
def test_auto_is_what_the_cpu_is_fast_at(
    monkeypatch: pytest.MonkeyPatch, capability: str, multiplies: bool, expected: torch.dtype
) -> None:
    """The last is a CPU that could, and is held to less (`ATEN_CPU_CAPABILITY`)."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: multiplies)
    assert compute_dtype("auto", CPU) == expected
    assert compute_dtype("auto", CUDA) == torch.bfloat16
    assert compute_dtype("float16", CPU) == torch.float16


def test_types_have_the_names_that_settings_give_them() -> None:
    assert getattr(torch, dtype_name(torch.bfloat16)) == torch.bfloat16
    assert dtype_name(compute_dtype("float16", CPU)) == "float16"


def test_kernels_for_gpus_take_no_pages_of_another_type(monkeypatch: pytest.MonkeyPatch) -> None:
    model = LocalPrefill(CHECKPOINT, 128).model
    assert model.pages_kept_as("bfloat16").dtype == torch.bfloat16
    monkeypatch.setattr(type(model), "device", CUDA)
    with pytest.raises(MixedPrecisionError) as refused:
        model.pages_kept_as("bfloat16")
    assert vars(refused.value) == {"pages": "bfloat16", "model": "float32"}
    assert model.pages_kept_as("auto").dtype == torch.float32
    assert model.pages_kept_as("fp8_e4m3").quantized
