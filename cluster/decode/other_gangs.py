"""Whether prompts under way are to go on at another gang: the one that has them was asked to go.

Serve tells a replica nothing when it asks it to go: it only takes it off its list, and waits for it
to finish. So whoever waits for prompts asks all gangs that are on the list.
"""

import asyncio
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from ray.serve.handle import DeploymentHandle

from ..call_errors import CallError
from ..messages import Standing
from ..settings import HandOffTerms
from ..tasks import detached

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 2.0
_LOOKS = 2
"""So often, one after the other, no gang must say that it has the prompt: lists come late."""


@dataclass(eq=False)
class PromptAtGang:
    """A prompt that a gang of a deployment has, under its order's name.

    `absent` counts the looks, one after the other, in which only others were there to go on.
    """

    prefill: DeploymentHandle
    name: str
    absent: int = 0

    @property
    def is_to_go_on(self) -> bool:
        """Whether its gang was asked to go, and another one could go on with it."""
        return self.absent >= _LOOKS

    def hear(self, said: list[Standing]) -> None:
        """What all gangs on the list said in one look; nothing where one of them did not answer."""
        has_it = any(self.name in gang.has for gang in said)
        others = any(gang.takes_others for gang in said)
        self.absent = self.absent + 1 if others and not has_it else 0


class OtherGangs:
    """Asks the gangs about all prompts of a decode replica: once a period, however many these are.

    Args:
        terms: of the replica's worker, for which another gang must be able to compute.
    """

    def __init__(self, terms: HandOffTerms) -> None:
        self._terms = terms
        self._prompts: set[PromptAtGang] = set()
        self._looking: asyncio.Task[None] | None = None

    @contextmanager
    def watching(self, prompt: PromptAtGang) -> Iterator[None]:
        """Look after a prompt until the end of the block."""
        self._prompts.add(prompt)
        if self._looking is None or self._looking.done():
            self._looking = detached(self._look())
        try:
            yield
        finally:
            self._prompts.discard(prompt)
            if not self._prompts:
                self._looking.cancel()
                self._looking = None

    async def _look(self) -> None:
        await asyncio.sleep(_LOOK_SECONDS)
        while True:
            asked = [self._ask(prefill) for prefill in {each.prefill for each in self._prompts}]
            # Gangs that hang are given up when the next look is due.
            await asyncio.gather(asyncio.sleep(_LOOK_SECONDS), *asked)

    async def _ask(self, prefill: DeploymentHandle) -> None:
        """Have all gangs of a deployment say what they have of its prompts."""
        prompts = [p for p in self._prompts if p.prefill is prefill and not p.is_to_go_on]
        if not prompts:
            return
        try:
            names = [prompt.name for prompt in prompts]
            asked = prefill.broadcast("standing", names, self._terms)
            said = await asked.results_async(timeout_s=_LOOK_SECONDS)
        except (*CallError, TimeoutError):
            said = []  # One of them hangs or dies, or none is up.
        except Exception:
            # One look that fails, whatever Serve says, must not be the last of all prompts.
            logger.exception("gangs could not be asked what they have")
            said = []
        for prompt in prompts:
            prompt.hear(said)
