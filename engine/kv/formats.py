"""The names of the formats that KV pages are kept in, without torch."""

from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch

KVCacheDtype = Literal["auto", "bfloat16", "fp8_e4m3"]
"""In the type that the model computes in, in bfloat16, or as e4m3 with scales."""


def dtype_name(dtype: "torch.dtype") -> str:
    """As "bfloat16"."""
    return str(dtype).removeprefix("torch.")
