"""How small tables reach a GPU without making the host wait for it."""

import torch
from torch import Tensor


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; on a GPU it is there for whatever is launched from now on.

    A copy from ordinary memory would wait for everything that is under way on the stream.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
