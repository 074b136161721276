"""Seeded random weights in place of a checkpoint's, made where they are needed."""

import hashlib

import torch
from torch import Tensor

from ..errors import CheckpointError

_BIAS_STD = 0.02


class RandomWeights:
    """Stands in for a CheckpointReader: the same tensors for the same seed and kind of device.

    Matrices are normally distributed with variance 1 / columns, so that whatever goes in with
    variance 1 comes out with it, and hidden states stay small through any number of layers. Norms
    are 1. A rank's rows are cut from the whole tensor, so every mesh has the same model.
    """

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._seed, self._dtype, self._device = seed, dtype, device

    def read(
        self, name: str, shape: tuple[int, ...], rows: slice | None = None, axis: int = 0
    ) -> Tensor:
        """The tensor `name` of `shape`, or only `rows` along `axis` where given."""
        whole = torch.empty(shape, dtype=self._dtype, device=self._device)
        if name.endswith("norm.weight"):
            whole.fill_(1)
        else:
            std = _BIAS_STD if len(shape) == 1 else shape[-1] ** -0.5
            whole.normal_(std=std, generator=self._generator(name))
        if rows is None:
            return whole
        # A copy, so that the rest can be forgotten.
        return (whole[rows] if axis == 0 else whole[:, rows]).clone()

    def shape(self, name: str) -> tuple[int, ...]:
        """No tensor has one of its own.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(f"random weights have no {name}; a quantized checkpoint has")

    def _generator(self, name: str) -> torch.Generator:
        digest = hashlib.blake2b(f"{self._seed} {name}".encode(), digest_size=8).digest()
        seed = int.from_bytes(digest, "little", signed=True)
        return torch.Generator(self._device).manual_seed(seed)
