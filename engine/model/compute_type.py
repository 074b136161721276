"""Which floating-point type a model computes in, and what types are called."""

import torch

from .config import Dtype


def compute_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The type of weights and hidden states on a device.

    "auto" is bfloat16 where products of it are fast: on GPUs, and on CPUs that have instructions
    for them. On others they take several times as long as float32's, which "auto" is there.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" or _multiplies_bfloat16()
    return torch.bfloat16 if fast else torch.float32


def _multiplies_bfloat16() -> bool:
    """Whether this CPU does, and PyTorch may use it: AVX-512 alone has no such instructions."""
    # Of PyTorch's own, `torch.cpu.get_capabilities` is not in 2.11 yet.
    can: bool = torch.cpu._is_avx512_bf16_supported()  # pyright: ignore[reportPrivateUsage]
    return can and "AVX512" in torch.backends.cpu.get_cpu_capability()
