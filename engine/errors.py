"""Errors that callers are expected to meet and tell their users about.

Each message is one sentence that says what is wrong and, where there is one, the mend.
"""


class LongreachError(Exception):
    """The root of everything this project raises on purpose."""


class CheckpointError(LongreachError):
    """A checkpoint folder cannot be served: another architecture, a missing or misshapen tensor."""


class ConfigurationError(LongreachError):
    """A combination of settings that cannot run."""


class InvalidRequestError(LongreachError):
    """A request that can never be served as it stands; nothing was reserved for it."""


class PromptTooLongError(InvalidRequestError):
    """The prompt, or prompt plus the tokens asked for, exceeds what can be served."""


class OutOfPagesError(LongreachError):
    """The page pool has too few free pages right now; the same request may fit later."""

    def __init__(self, needed: int, free: int, total: int) -> None:
        super().__init__(f"{needed} KV pages are needed but only {free} of {total} are free")
        self.needed = needed
        self.free = free
        self.total = total


class TransferError(LongreachError):
    """Pages could not be handed to the decode replica."""
