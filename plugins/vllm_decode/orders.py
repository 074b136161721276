"""What vLLM has its worker do on the other ranks, where it spans several devices.

vLLM's engine core and its scheduler are the leading rank's alone. Whatever they ask of a worker,
all ranks do, each with its shard of the model and its KV heads of the same blocks.
"""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, eq=False)
class BeginOrder:
    """Start vLLM's worker, load the shard, and meet the others. `config` is vLLM's."""

    config: Any
    meeting: str


@dataclass(frozen=True, eq=False)
class CallOrder:
    """Call a method of the worker's; what it returns is sent back where it `is_answered`."""

    method: str
    arguments: tuple[Any, ...] = ()
    named: dict[str, Any] = field(default_factory=dict)
    is_answered: bool = False


@dataclass(frozen=True)
class ReadyOrder:
    """All blocks are allocated: pages may come."""


VllmOrder = BeginOrder | CallOrder | ReadyOrder
