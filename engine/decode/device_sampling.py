"""Tokens drawn on the device, right behind a step's logits, by what the host's samplers ask for.

A row's bias and counts lie on the device for as long as the same sequence has the row; of each
step only its newest token is brought there. They come whole when another sequence takes the row.
What grammars allow comes with every step. It is waited for when the step's logits have been
launched, so that it is found out while the device computes these.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from ...kernels import sampling
from ...kernels.sampling import MASKED, PENALIZED, Adjustments, RowInputs
from ..errors import GrammarError
from .grammar import Mask
from .graph_inputs import host_memory
from .launches import Capture, Launch, StepResults
from .sampler import Drawing, Penalties


class HeldAdjustments:
    """Bias and counts of the rows of all batches, and whose they are."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.vocab_size, self.device = vocab_size, device
        self.on_device = Adjustments.allocate(rows, vocab_size, device)
        self.masks = host_memory(device, *self.on_device.mask.shape, dtype=torch.int32)
        """What is brought to the device of each row's mask."""
        self._held: list[tuple[Penalties, int] | None] = [None] * rows

    def hold(self, row: int, penalties: Penalties) -> None:
        """Have a row's on the device, but for its newest token, which its inputs bring.

        A step that failed may come again with the same tokens.
        """
        held = self._held[row]
        if held is None or held[0] is not penalties or penalties.total - held[1] not in (0, 1):
            target = self.on_device
            target.bias[row].copy_(torch.from_numpy(penalties.bias()))
            target.answered[row].copy_(torch.from_numpy(penalties.answered))
            target.seen[row].copy_(torch.from_numpy(penalties.seen.view("uint8")))
        self._held[row] = penalties, penalties.total


class BatchDrawing:
    """Draws for batches of up to `rows`.

    Args:
        step: launches a step of so many rows. Its logits lie where those of all such steps do;
            where everything is launched anew every time, it is not asked.
    """

    def __init__(self, rows: int, held: HeldAdjustments, capture: Capture, step: Launch) -> None:
        self._held, self._step = held, step
        self._results: StepResults | None = None
        self._adjustments = held.on_device.first(rows)
        self._on_device = RowInputs.allocate(rows, held.device)
        on_gpu = held.device.type == "cuda"
        self._host = RowInputs.allocate(rows, torch.device("cpu"), pinned=on_gpu)
        self._launch = capture(self._sample)

    def run(self, results: StepResults, drawings: Sequence[Drawing | None]) -> StepResults:
        """Draw for the rows of a step that ask for it; of others, what comes out means nothing.

        The device must have read what the step before brought.
        """
        self._results = results
        for row, drawing in enumerate(drawings):
            if drawing is not None:
                self._ask(row, drawing)
        if any(drawing is not None and drawing.allowed is not None for drawing in drawings):
            rows = len(drawings)
            self._adjustments.mask[:rows].copy_(self._held.masks[:rows], non_blocking=True)
        self._on_device.storage.copy_(self._host.storage, non_blocking=True)
        return self._launch()

    def _ask(self, row: int, drawing: Drawing) -> None:
        vocab = self._held.vocab_size
        top_k = min(drawing.top_k, vocab) or vocab
        penalties = drawing.penalties
        own: dict[str, Any] = {}
        if penalties is not None:
            self._held.hold(row, penalties)
            newest = penalties.newest
            own = {
                "repetition": penalties.repetition,
                "frequency": penalties.frequency,
                "presence": penalties.presence,
                "newest": newest,
                "times": int(penalties.answered[newest]) if newest >= 0 else 0,
            }
        flags = PENALIZED if penalties is not None else 0
        if drawing.allowed is not None:
            flags |= self._mask(row, drawing.allowed)
        self._host.set(
            row, flags=flags, temperature=drawing.temperature, top_k=top_k, top_p=drawing.top_p,
            min_p=drawing.min_p, draw=drawing.draw, **own,
        )  # fmt: skip

    def _mask(self, row: int, allowed: Callable[[], Mask]) -> int:
        """The flag of a row whose mask there is."""
        try:
            self._held.masks.numpy()[row] = allowed().view(np.int32)
        except GrammarError:
            return 0  # whatever is drawn cannot be taken, which ends one answer instead of all
        return MASKED

    def _sample(self) -> StepResults:
        if self._results is None:
            self._results = self._step()
        logits = self._results.logits
        return StepResults(logits, *sampling.sample(logits, self._on_device, self._adjustments))
