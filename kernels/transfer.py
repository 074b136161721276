"""How small tensors reach a GPU, and come from it, without making the host wait for it."""

import torch
from torch import Tensor


def without_waiting(tensor: Tensor, device: torch.device) -> Tensor:
    """A CPU tensor on `device`; on a GPU it is there for whatever is launched from now on.

    A copy from ordinary memory would wait for everything that is under way on the stream.
    """
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def begin_copy_to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that holds what it should when the current stream has come so far."""
    if tensor.is_cuda:
        return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(
            tensor, non_blocking=True
        )
    return tensor
