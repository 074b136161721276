"""What stands between vLLM and a decode worker."""

from dataclasses import dataclass

from ...engine.errors import FactualError


@dataclass(eq=False)
class OtherConnectorError(FactualError):
    """vLLM gave its `end`, the scheduler's or the worker's, another connector than was asked for.

    `found` and `expected` are classes.
    """

    end: str
    found: str
    expected: str

    @property
    def sentence(self) -> str:
        return (
            f"vLLM gave its {self.end} {self.found} as its KV connector, and pages from elsewhere "
            f"come by {self.expected}; this vLLM was never seen to do that"
        )


@dataclass(eq=False)
class UnknownLayerError(FactualError):
    """vLLM gave a tensor of its KV cache a `name` that does not say whose it is."""

    name: str

    @property
    def sentence(self) -> str:
        return (
            f"vLLM calls a layer of its KV cache {self.name!r}, and its number is looked for "
            'behind "layers."; this vLLM was never seen to do that'
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
