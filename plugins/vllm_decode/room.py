"""How many pages vLLM needs for a request, so that it is never short of them half-way.

vLLM takes pages as answers grow, and where none are left it drops a whole sequence and computes it
again, a million tokens of prompt if that is what it has. So whoever comes in is counted with all
that it may ever take, and waits until there is room for it.
"""

from dataclasses import dataclass

from ...engine.messages import GenerationRequest
from ...kernels.page_size import PAGE_TOKENS, pages_for


@dataclass(frozen=True)
class Room:
    """Pages that a request may ever take: `shared` by its choices, and each one's `own`."""

    shared: int
    own: int

    @classmethod
    def of(cls, request: GenerationRequest) -> "Room":
        """Of one whose choices find their prompt where the first one has it.

        vLLM computes a prompt's last token at least, whatever it finds of it: so the page with that
        token is each choice's own, full or not.
        """
        shared = (len(request.prompt) - 1) // PAGE_TOKENS
        return cls(shared, _whole(request) - shared)

    @classmethod
    def apart(cls, request: GenerationRequest) -> "Room":
        """Of one whose choices may have to compute the prompt each for itself."""
        return cls(0, _whole(request))

    def most(self, choices: int) -> int:
        """Of so many choices."""
        return self.shared + choices * self.own


def _whole(request: GenerationRequest) -> int:
    return pages_for(len(request.prompt) + request.sampling.max_tokens)
