"""What rows of logits are drawn from: tensors at addresses that stay, for captured launches."""

from dataclasses import dataclass

import torch
from torch import Tensor

PENALIZED = 1
"""Flag of a row whose logits are changed by bias and penalties."""
MASKED = 2
"""Flag of a row that may choose only what its mask allows."""


@dataclass(frozen=True, eq=False)
class RowInputs:
    """Views of one tensor [n, 12] of 8 bytes an element, so that one copy brings a whole step's.

    `top_k` is 1 or more, the vocabulary's size where all may come; `top_p` and `min_p` are 1 and 0
    where they are off. `draw` is uniform in [0, 1). `newest` is the token that was chosen last, -1
    for none, and `times` how often it was.
    """

    storage: Tensor  # float64 [n, 12]

    @classmethod
    def allocate(cls, count: int, device: torch.device, pinned: bool = False) -> "RowInputs":
        """For so many rows, which ask for the best token."""
        inputs = cls(torch.zeros(count, 12, dtype=torch.float64, device=device, pin_memory=pinned))
        inputs.storage[:, 0] = 1.0
        inputs.storage[:, 1] = 1.0
        inputs.storage[:, 2] = 1.0
        return inputs

    def set(
        self,
        row: int,
        *,
        temperature: float,
        top_k: int,
        top_p: float,
        min_p: float,
        draw: float,
        flags: int = 0,
        repetition: float = 1.0,
        frequency: float = 0.0,
        presence: float = 0.0,
        newest: int = -1,
        times: int = 0,
    ) -> None:
        """What one row asks for, on the host."""
        self.storage.numpy()[row] = (
            temperature, top_k, top_p, min_p, draw, flags, repetition, frequency, presence,
            newest, times, 0.0,
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Adjustments:
    """What changes rows' logits before anything is drawn.

    `bias` is added; `answered` counts each token of the answer, and `seen` says which have come
    there or in the prompt. A `mask` has a bit for each token, the lowest first, that is 1 where it
    may come.
    """

    bias: Tensor  # float32 [rows, vocab]
    answered: Tensor  # float32 [rows, vocab]
    seen: Tensor  # uint8 [rows, vocab]
    mask: Tensor  # int32 [rows, ceil(vocab / 32)]

    @classmethod
    def allocate(cls, rows: int, vocab: int, device: torch.device) -> "Adjustments":
        """Nothing adjusted."""
        bias = torch.zeros(rows, vocab, dtype=torch.float32, device=device)
        seen = torch.zeros(rows, vocab, dtype=torch.uint8, device=device)
        mask = torch.zeros(rows, -(-vocab // 32), dtype=torch.int32, device=device)
        return cls(bias, torch.zeros_like(bias), seen, mask)

    def first(self, rows: int) -> "Adjustments":
        """Views of the first rows."""
        return Adjustments(*(each[:rows] for each in vars(self).values()))
