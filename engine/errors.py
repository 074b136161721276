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

    def __reduce__(self) -> tuple[type["OutOfPagesError"], tuple[int, int, int]]:
        return type(self), (self.needed, self.free, self.total)


class TransferError(LongreachError):
    """Pages could not be handed to the decode replica."""


class QueueFullError(LongreachError):
    """Too many requests wait already; try again in `retry_after` seconds."""

    def __init__(self, waiting: int, retry_after: int = 5) -> None:
        super().__init__(f"{waiting} requests wait already; try again in {retry_after} s")
        self.waiting = waiting
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[type["QueueFullError"], tuple[int, int]]:
        return type(self), (self.waiting, self.retry_after)


class GenerationError(LongreachError):
    """One answer cannot go on; others in the same batch do."""


class OutOfMemoryError(GenerationError):
    """The device had no memory left for a step of one answer; smaller settings mend it."""


class UnavailableError(LongreachError):
    """A part of the cluster died or is not up yet; the same request may be sent again."""


def in_one_line(error: BaseException) -> str:
    """What an error says, for a sentence: its first line, or its type where it says nothing.

    What came from another process is wrapped in an error whose words are a stack trace, and whose
    `cause` is the one that was raised there.
    """
    cause = getattr(error, "cause", None)
    if isinstance(cause, BaseException):
        return in_one_line(cause)
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
