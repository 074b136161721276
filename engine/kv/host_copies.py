"""Pages of a GPU on the host."""

import torch
from torch import Tensor

from .pages import Pages


class HostCopies:
    """Brings pages to the host through one buffer, which the next ones overwrite.

    It is pinned and grows to the most that was brought at once: a copy into fresh memory of the
    ordinary kind takes several times as long.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def bring(self, pages: Pages) -> Pages:
        """The pages themselves if they are on the host; else a copy that holds until the next.

        Waits for the current stream.
        """
        device = pages.values.device
        if device.type == "cpu":
            return pages
        bits = self._room(pages.values.nbytes).view(pages.bits.dtype).view(pages.values.shape)
        bits.copy_(pages.bits, non_blocking=True)
        scales = None if pages.scales is None else pages.scales.cpu()
        torch.cuda.current_stream(device).synchronize()
        return Pages(bits.view(pages.values.dtype), scales)

    def _room(self, size: int) -> Tensor:
        if self._buffer is None or len(self._buffer) < size:
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return self._buffer[:size]
