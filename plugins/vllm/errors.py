"""What the plugin refuses, and what may be done instead. vLLM's own options are named here."""

from dataclasses import dataclass

from ...engine.errors import ConfigurationError, FactualError


@dataclass(eq=False)
class UntestedVersionError(FactualError, ConfigurationError):
    """This vLLM is none that the plugin was tried with: `first` up to `last`."""

    version: str
    first: str
    last: str

    @property
    def sentence(self) -> str:
        return (
            f"Longreach's plugin was tried with vLLM {self.first} to {self.last}, and this is "
            f"{self.version}; install one of those"
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
