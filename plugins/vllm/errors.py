"""What the plugin refuses, and what may be done instead. vLLM's own options are named here."""

from dataclasses import dataclass

from ...engine.errors import ConfigurationError, FactualError


@dataclass(eq=False)
class UntestedVersionError(FactualError, ConfigurationError):
    """This vLLM is older than the `first` that the plugin was tried with, or newer than the `last`.

    Those between were not tried, and are let in.
    """

    version: str
    first: str
    last: str

    @property
    def sentence(self) -> str:
        return (
            f"Longreach's plugin was tried with vLLM {self.first} and {self.last}, and lets those "
            f"between in untried; this is {self.version}; install one of the two"
        )


@dataclass(eq=False)
class BackendNotChosenError(FactualError, ConfigurationError):
    """A model with Dual Chunk Attention would be served by a backend that has none."""

    model: str

    @property
    def sentence(self) -> str:
        return (
            f"{self.model} has a dual_chunk_attention_config, which vLLM's own backends do not "
            "compute; add --attention-backend CUSTOM"
        )


@dataclass(eq=False)
class NoDualChunkError(FactualError, ConfigurationError):
    """The backend was chosen for a model that has no use for it."""

    model: str

    @property
    def sentence(self) -> str:
        return (
            f"{self.model} has no dual_chunk_attention_config; leave --attention-backend CUSTOM out"
        )


@dataclass(eq=False)
class UnsupportedOptionError(FactualError, ConfigurationError):
    """An option of vLLM's has a value that the plugin cannot honour; `instead` is what it can."""

    option: str
    value: str
    instead: str

    @property
    def sentence(self) -> str:
        return f"with Dual Chunk Attention, {self.option} cannot be {self.value}; {self.instead}"


@dataclass(eq=False)
class UnknownPromptError(FactualError):
    """Nobody said how long the prompt of a step's `sequence` is, whose rows are computed.

    `first` and `last` are versions of vLLM that say it where it is listened for.
    """

    sequence: int
    first: str
    last: str

    @property
    def sentence(self) -> str:
        return (
            f"vLLM computes sequence {self.sequence} of a step and never said how long its prompt "
            "is, which attention depends on; install a vLLM that the plugin was tried with: "
            f"{self.first} or {self.last}"
        )


@dataclass(eq=False)
class OtherPagesError(FactualError, ConfigurationError):
    """vLLM's blocks are not laid out as pages are, one after another and each without gaps.

    A layer of them has this `shape` and these `strides`, in values; of `expected`, -1 is for any
    number of pages.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    expected: tuple[int, ...]

    @property
    def sentence(self) -> str:
        return (
            f"vLLM keeps a layer of its KV cache as {self.shape} with strides {self.strides}, and "
            f"pages are {self.expected} without gaps; this vLLM was never seen to do that"
        )


@dataclass(eq=False)
class UntoldError(FactualError):
    """vLLM did not say what a layer's attention must know, by the name of its `argument`."""

    argument: str

    @property
    def sentence(self) -> str:
        return (
            f"vLLM makes a layer's attention and does not say its {self.argument}; this vLLM was "
            "never seen to do that"
        )
