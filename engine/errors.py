"""Errors that callers are expected to meet and tell their users about.

Each says in one sentence what is wrong, with its numbers as fields where it has any. What a user
may change is not said here: only the cluster knows its settings' names, and only a command those of
its options. They add it with `with_remedy`.
"""

from dataclasses import dataclass, fields
from typing import Any, Literal, Self, cast

GB = 1e9

Phase = Literal["prefill", "decode"]
"""Whose memory or pages an error is about."""


class LongreachError(Exception):
    """The root of everything this project raises on purpose.

    `remedy` says what a user may change, in the words of whoever knows what can be set.
    """

    remedy: str | None = None

    @property
    def sentence(self) -> str:
        """What is wrong."""
        return super().__str__()

    def with_remedy(self, remedy: str | None) -> Self:
        """The same error, which says the remedy from now on; the first one that is named stays."""
        if self.remedy is None:
            self.remedy = remedy
        return self

    def __str__(self) -> str:
        return self.sentence if self.remedy is None else f"{self.sentence}; {self.remedy}"


class FactualError(LongreachError):
    """One that is made of facts instead of words. Its classes are dataclasses, and pickle."""

    def __reduce__(self) -> tuple[type[Self], tuple[Any, ...], dict[str, Any]]:
        values = tuple(getattr(self, field.name) for field in fields(cast(Any, self)))
        # The state has what was added later: a remedy, or notes.
        return type(self), values, self.__dict__


class CheckpointError(LongreachError):
    """A checkpoint folder cannot be served: another architecture, a missing or misshapen tensor."""


@dataclass(eq=False)
class WeightFormatError(FactualError, CheckpointError):
    """A checkpoint keeps its weights in a format that is not served; `kept` names it."""

    folder: str
    kept: str

    @property
    def sentence(self) -> str:
        return f"{self.folder}: weights kept as {self.kept} are not supported"


class ConfigurationError(LongreachError):
    """A combination of sizes and choices that cannot run."""


@dataclass(eq=False)
class TensorParallelError(FactualError, ConfigurationError):
    """A model cannot be cut into so many tensor parallel ranks; `possible` are those it can be."""

    ranks: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    possible: tuple[int, ...]

    @property
    def sentence(self) -> str:
        return (
            f"{self.ranks} tensor parallel ranks do not divide this model's {self.num_heads} query "
            f"heads, {self.num_kv_heads} KV heads and MLP of {self.intermediate_size}"
        )


@dataclass(eq=False)
class MixedPrecisionError(FactualError, ConfigurationError):
    """A GPU's kernels do not read pages of one type beside a model of another."""

    pages: str
    model: str

    @property
    def sentence(self) -> str:
        return (
            f"on GPUs, KV pages in {self.pages} need a model of that type, and this one computes "
            f"in {self.model}"
        )


@dataclass(eq=False)
class NarrowComputeError(FactualError, ConfigurationError):
    """A GPU multiplies weights of 8 bits for models that compute in bfloat16 only."""

    model: str

    @property
    def sentence(self) -> str:
        return (
            f"on GPUs, weights of 8 bits need a model that computes in bfloat16, and this one "
            f"computes in {self.model}"
        )


@dataclass(eq=False)
class NoNarrowProductsError(FactualError, ConfigurationError):
    """A GPU is too old for products of 8 bits."""

    gpu: str

    @property
    def sentence(self) -> str:
        return f"{self.gpu} has no products of 8 bits, which came with compute capability 8.9"


@dataclass(eq=False)
class DividedBlockError(FactualError, ConfigurationError):
    """A rank's part of a matrix, numbers [first, last), would divide blocks that share a scale."""

    name: str
    first: int
    last: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.name} has a scale for each block of 128 × 128 weights, and a rank's part of "
            f"it, {self.first} to {self.last}, is no whole blocks"
        )


@dataclass(frozen=True)
class MemoryNeeds:
    """What a process would allocate on its device, and what it finds there. All bytes.

    `free_bytes` are for this process, one of `processes` that divide what the device has free.
    Pages that are `quantized` cannot be made smaller, nor can weights that are `narrow`.
    """

    phase: Phase
    cache_tokens: int
    cache_bytes: int
    weight_bytes: int
    computing_bytes: int
    free_bytes: int
    processes: int
    quantized: bool
    narrow: bool = False

    @property
    def wanted(self) -> str:
        """What is needed, in words."""
        return (
            f"{self.cache_tokens:,} tokens of KV cache for {self.phase} need "
            f"{self.cache_bytes / GB:.1f} GB beside {self.weight_bytes / GB:.1f} GB of weights and "
            f"up to {self.computing_bytes / GB:.1f} GB for computing"
        )

    def free(self, is_free: str) -> str:
        """What is there, in words, as "80.0 GB free for each of 2 processes"."""
        each = f" for each of {self.processes} processes" if self.processes > 1 else ""
        return f"{self.free_bytes / GB:.1f} GB {is_free}{each}"


@dataclass(eq=False)
class DoesNotFitError(FactualError, ConfigurationError):
    """A process would not fit on its device; nothing was allocated.

    `largest_cache` is in tokens, and 0 where not even the weights leave room for pages.
    """

    needs: MemoryNeeds
    largest_cache: int

    @property
    def sentence(self) -> str:
        free = self.needs.free("free")
        if self.largest_cache == 0:
            return (
                f"{self.needs.phase}'s weights take {self.needs.weight_bytes / GB:.1f} GB and the "
                f"device has {free}, which leaves no room for KV pages and for computing"
            )
        return f"{self.needs.wanted}, and of {free} {self.largest_cache:,} tokens would fit"


@dataclass(eq=False)
class LoadingOutOfMemoryError(FactualError, ConfigurationError):
    """A device's memory ran out although sizes fitted: others allocate on the same device."""

    needs: MemoryNeeds

    @property
    def sentence(self) -> str:
        return (
            f"the device ran out of memory: {self.needs.wanted}, and of "
            f"{self.needs.free('that were free')} other processes may have allocated a part since"
        )


@dataclass(eq=False)
class StepDoesNotFitError(FactualError, ConfigurationError):
    """The device has no memory left to prepare the largest decode step."""

    sequences: int

    @property
    def sentence(self) -> str:
        return (
            f"a decode step of {self.sequences} sequences does not fit in the device's memory "
            "beside weights and KV pages"
        )


@dataclass(eq=False)
class CannotSharePagesError(FactualError, ConfigurationError):
    """The memory that pages lie in cannot be shared with other processes."""

    reason: str

    @property
    def sentence(self) -> str:
        return f"KV pages cannot be shared between processes ({self.reason})"


@dataclass(eq=False)
class CannotReachPagesError(FactualError, ConfigurationError):
    """The memory that pages lie in cannot be made readable for other processes."""

    reason: str

    @property
    def sentence(self) -> str:
        return f"KV pages cannot be registered with NIXL ({self.reason})"


@dataclass(eq=False)
class NoNixlError(FactualError, ConfigurationError):
    """NIXL is not installed."""

    @property
    def sentence(self) -> str:
        return "NIXL, which pages shall travel by, is not installed"


@dataclass(eq=False)
class NoVllmError(FactualError, ConfigurationError):
    """vLLM is not installed, or not as it has to be; `reason` is what its import says, say."""

    reason: str

    @property
    def sentence(self) -> str:
        return f"vLLM cannot be had ({self.reason})"


class InvalidRequestError(LongreachError):
    """A request that can never be served as it stands; nothing was reserved for it."""


class PromptTooLongError(InvalidRequestError):
    """The prompt, or prompt plus the tokens asked for, exceeds what can be served."""


@dataclass(eq=False)
class CacheTooSmallError(FactualError, PromptTooLongError):
    """A request needs more tokens of KV cache than there are altogether."""

    phase: Phase
    needed: int
    total: int

    @property
    def sentence(self) -> str:
        return (
            f"the request needs {self.needed} tokens of KV cache and {self.phase} has {self.total}"
        )


@dataclass(eq=False)
class OutOfPagesError(FactualError):
    """The page pool has too few free pages right now; the same request may fit later."""

    needed: int
    free: int
    total: int

    @property
    def sentence(self) -> str:
        return f"{self.needed} KV pages are needed but only {self.free} of {self.total} are free"


class TransferError(LongreachError):
    """Pages could not be handed to the decode replica."""


@dataclass(eq=False)
class PageFormatError(FactualError, TransferError):
    """Pages came in another type than the one that they are kept in."""

    came: str
    kept: str

    @property
    def sentence(self) -> str:
        return f"KV pages came as {self.came} and are kept as {self.kept} here"


@dataclass(eq=False)
class RefusedPagesError(FactualError, TransferError):
    """Pages of a request could not be put in their place, and why."""

    request_id: str
    place: str
    reason: TransferError

    @property
    def sentence(self) -> str:
        return f"request {self.request_id}, {self.place}: {self.reason.sentence}"


@dataclass(eq=False)
class OtherHostError(FactualError, TransferError):
    """Pages lie in the memory of another host, where they cannot be mapped."""

    host: str
    wanted_on: str

    @property
    def sentence(self) -> str:
        return (
            f"KV pages lie on host {self.host} and are wanted on {self.wanted_on}, where they "
            "cannot be mapped"
        )


@dataclass(eq=False)
class CannotMapPagesError(FactualError, TransferError):
    """Pages of another process cannot be mapped; their owner may have died."""

    reason: str

    @property
    def sentence(self) -> str:
        return f"a prefill rank's KV pages cannot be mapped ({self.reason})"


@dataclass(eq=False)
class ReceiveOutOfMemoryError(FactualError, TransferError):
    """The decode side's device had no memory left for pages on their way to their place.

    No OutOfMemoryError: whoever pushes pages has the memory that it needs.
    """

    request_id: str

    @property
    def sentence(self) -> str:
        return f"decode ran out of memory as it received pages of request {self.request_id}"


@dataclass(eq=False)
class QueueFullError(FactualError):
    """Too many requests wait already; try again in `retry_after` seconds."""

    waiting: int
    retry_after: int = 5

    @property
    def sentence(self) -> str:
        return f"{self.waiting} requests wait already; try again in {self.retry_after} s"


class GenerationError(LongreachError):
    """One answer cannot go on; others in the same batch do."""


class GrammarError(GenerationError, InvalidRequestError):
    """An answer cannot be held to the grammar that its request names."""


class OutOfMemoryError(GenerationError):
    """The device had no memory left for a step of one answer."""


@dataclass(eq=False)
class ChunkOutOfMemoryError(FactualError, OutOfMemoryError):
    """The device had no memory left for tokens [start, end) of a prompt."""

    start: int
    end: int

    @property
    def sentence(self) -> str:
        return f"prefill ran out of memory at tokens {self.start} to {self.end} of a prompt"


class DecodeOutOfMemoryError(FactualError, OutOfMemoryError):
    """The device had no memory left for something in decode."""


@dataclass(eq=False)
class StartOutOfMemoryError(DecodeOutOfMemoryError):
    """The device had no memory left to let a request's choices begin."""

    choices: int

    @property
    def sentence(self) -> str:
        return f"decode ran out of memory as a request with {self.choices} choices started"


@dataclass(eq=False)
class StepOutOfMemoryError(DecodeOutOfMemoryError):
    """The device had no memory left for a step of so many sequences."""

    sequences: int

    @property
    def sentence(self) -> str:
        return f"decode ran out of memory at a step of {self.sequences} sequences"


class UnavailableError(LongreachError):
    """A part of the cluster died or is not up yet; the same request may be sent again."""


class LostError(UnavailableError):
    """A process died, or hung, with a request under way. It can be begun again in another one.

    `begun`: whether the process had begun on the request, which may be what killed it.
    """

    def __init__(self, sentence: str, begun: bool = True) -> None:
        super().__init__(sentence)
        self.begun = begun


@dataclass(eq=False)
class LeftMeshError(FactualError, UnavailableError):
    """What ranks compute together was given up: one of them is lost, or another one comes."""

    @property
    def sentence(self) -> str:
        return "this rank has left the mesh that it computed in"


class NotUpError(UnavailableError):
    """What would take a request is not up, or not again yet. It has not been begun."""


@dataclass(eq=False)
class PoisonousError(FactualError):
    """So many processes died under a request, at the same place, that it may have killed them."""

    deaths: int

    @property
    def sentence(self) -> str:
        return (
            f"{self.deaths} processes died at the same place of the request; it is not tried again"
        )


@dataclass(eq=False)
class CancelledElsewhereError(FactualError, UnavailableError):
    """A request was cancelled, and not by whoever runs it."""

    @property
    def sentence(self) -> str:
        return "the request was cancelled within the cluster; send it again"


def innermost(error: BaseException) -> BaseException:
    """What was raised in the other process, where an error came from one.

    Such an error is wrapped in one whose words are a stack trace, and whose `cause` is the error
    that was raised there.
    """
    cause = getattr(error, "cause", None)
    return innermost(cause) if isinstance(cause, BaseException) else error


def in_one_line(error: BaseException) -> str:
    """What an error says, for a sentence: its first line, or its type where it says nothing."""
    error = innermost(error)
    lines = (line.strip() for line in str(error).splitlines())
    return next((line for line in lines if line), type(error).__name__)
