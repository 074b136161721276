"""Points in a device's work that another thread may wait for."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Milestone:
    """Reached when what was launched before it has been computed; on a CPU, that is at once."""

    _event: torch.cuda.Event | None

    @classmethod
    def after_what_is_launched(cls, device: torch.device) -> "Milestone":
        """On the current stream."""
        if device.type != "cuda":
            return cls(None)
        # Blocking: whoever waits sleeps, and takes no core from the thread that launches.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(device))
        return cls(event)

    def wait(self) -> None:
        """Return when it is reached; without Python's lock meanwhile."""
        if self._event is not None:
            self._event.synchronize()
