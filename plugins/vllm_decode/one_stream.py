"""The stream of the device on which vLLM computes: one, whatever thread steps."""

import torch


class OneStream:
    """That of the thread that makes this, which has loaded vLLM; None on a CPU.

    In a thread that has no stream vLLM makes one, where it first sums over ranks: in the middle of
    a step, of which half is then launched on another stream. Some versions, 0.26 among them, do not
    even wait there for what was launched before.
    """

    def __init__(self, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._stream = torch.cuda.current_stream(device) if is_cuda else None

    def take(self) -> None:
        """Have this thread launch on it from now on."""
        if self._stream is not None:
            # vLLM puts a function of its own here, and so learns of it.
            torch.cuda.set_stream(self._stream)
