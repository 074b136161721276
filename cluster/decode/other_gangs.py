"""Whether a prompt under way is to go on at another gang: the one that has it was asked to go.

Serve tells a replica nothing when it asks it to go: it only takes it off its list, and waits for it
to finish. So whoever waits for a prompt asks all gangs that are on the list.
"""

import asyncio

from ray.serve.handle import DeploymentHandle

from ..call_errors import CallError
from ..messages import PrefillOrder, Standing
from ..tasks import detached

_LOOK_SECONDS = 2.0
_LOOKS = 2
"""So often, one after the other, no gang must say that it has the prompt: lists come late."""


class OtherGangs:
    """Asks the gangs of a deployment about an order, from `look` to `close`.

    Args:
        prefill: the deployment whose gangs they are.
    """

    def __init__(self, prefill: DeploymentHandle, order: PrefillOrder) -> None:
        self._prefill, self._order = prefill, order
        self._looking: asyncio.Task[None] | None = None
        self.are_to_go_on = False
        """Whether the gang that has the prompt was asked to go, and another one could go on."""

    def look(self) -> None:
        """Begin to ask."""
        self._looking = detached(self._look())

    def close(self) -> None:
        """Ask no more."""
        if self._looking is not None:
            self._looking.cancel()

    async def _look(self) -> None:
        without = 0
        while not self.are_to_go_on:
            await asyncio.sleep(_LOOK_SECONDS)
            without = without + 1 if await self._only_others() else 0
            self.are_to_go_on = without >= _LOOKS

    async def _only_others(self) -> bool:
        asked = self._prefill.broadcast("standing", self._order.name, self._order.terms)
        try:
            said = await asked.results_async(timeout_s=_LOOK_SECONDS)
        except (*CallError, TimeoutError):
            return False  # One of them hangs or dies, or none is up.
        return Standing.HAS_IT not in said and Standing.COULD_TAKE_IT in said
