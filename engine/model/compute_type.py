"""Which floating-point type a model computes in, and what types are called."""

import torch

from .config import Dtype


def compute_dtype(name: Dtype, device: torch.device) -> torch.dtype:
    """The type of weights and hidden states on a device.

    "auto" is bfloat16 where products of it are fast: on GPUs, and on CPUs with AVX-512. On others
    they take several times as long as float32's, which "auto" is there.
    """
    if name != "auto":
        return getattr(torch, name)
    fast = device.type == "cuda" or "AVX512" in torch.backends.cpu.get_cpu_capability()
    return torch.bfloat16 if fast else torch.float32
