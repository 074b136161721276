"""Which gang computes a prompt: the first, in the order of the settings, that takes its length."""

import asyncio
from bisect import bisect_left
from collections.abc import Iterable

from ray.serve.handle import DeploymentHandle


class PrefillRouter:
    """Knows the gangs' deployments by the prompt lengths that they take.

    Args:
        gangs: the longest prompt that each takes, in tokens and rising, and its deployment.
    """

    def __init__(self, gangs: Iterable[tuple[int, DeploymentHandle]]) -> None:
        self._longest, self._handles = zip(*gangs, strict=True)
        self._streams = [handle.options(stream=True) for handle in self._handles]

    def gang_for(self, prompt_tokens: int) -> DeploymentHandle:
        """The deployment that takes prompts of this length, with streamed answers.

        The ingress has refused what is longer than the last gang's limit.
        """
        return self._streams[bisect_left(self._longest, prompt_tokens)]

    async def check_health(self) -> None:
        """Return when every gang says that it is well; raise what the first one raises that is not.

        Serve asks one replica of each deployment, which it chooses as for a request.
        """
        await asyncio.gather(*(handle.check_health.remote() for handle in self._handles))
