"""What stands between vLLM and a decode worker."""

from dataclasses import dataclass

from ...engine.errors import ConfigurationError, FactualError


@dataclass(eq=False)
class OtherPagesError(FactualError, ConfigurationError):
    """vLLM's blocks are not laid out as pages are: `shape` is what a layer of them has."""

    shape: tuple[int, ...]
    expected: tuple[int, ...]

    @property
    def sentence(self) -> str:
        return (
            f"vLLM keeps a layer of its KV cache as {self.shape}, and pages are {self.expected}; "
            "this vLLM was never seen to do that"
        )


@dataclass(eq=False)
class UntoldRanksError(FactualError):
    """vLLM asks all ranks for a `call` in a way that the others are not told in, for a `reason`."""

    call: str
    reason: str
    instead: str

    @property
    def sentence(self) -> str:
        return f"vLLM asks all of its ranks for {self.call}, and {self.reason}; {self.instead}"


@dataclass(eq=False)
class UnaskedError(FactualError):
    """vLLM asks for a `call` that it has no `reason` to make as it is set up here."""

    call: str
    reason: str

    @property
    def sentence(self) -> str:
        return f"vLLM asks for {self.call}, and {self.reason}; this vLLM was never seen to do that"
