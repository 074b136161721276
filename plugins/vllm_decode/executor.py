# pyright: reportMissingImports=false, reportUntypedBaseClass=false
# vLLM is installed in an environment of its own.
"""vLLM's executor of the leading rank: its own worker is in this process, the others' in theirs.

vLLM's executors start the processes of their ranks themselves. Ours are there already, each with a
receiver for the pages of its heads, and are told what to do by the way on which the native engine's
ranks are told.
"""

from collections.abc import Callable
from typing import Any

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]
from vllm.utils.network_utils import get_distributed_init_method
from vllm.v1.executor.uniproc_executor import UniProcExecutor

from ...engine.decode.leader import Followers
from .errors import UntoldRanksError
from .orders import BeginOrder, CallOrder, ReadyOrder
from .sums import leave_symmetric_memory_out

_THIS_HOST = "127.0.0.1"
"""Where all ranks of a worker are."""


class LeadingExecutor(UniProcExecutor):
    """Has the others do what the worker here does.

    Args:
        followers: the other ranks.
        vllm_config: vLLM's own.
    """

    def __init__(self, followers: Followers, vllm_config: Any) -> None:
        self._followers = followers
        # Its port is ours from when it is chosen. vLLM asks torch for a store at that port, and
        # torch has one server for all of a process's stores that may share one.
        self._store = TCPStore(
            _THIS_HOST, 0, is_master=True, wait_for_workers=False, multi_tenant=True
        )
        self._meeting = get_distributed_init_method(_THIS_HOST, self._store.port)
        super().__init__(vllm_config)

    def _init_executor(self) -> None:
        leave_symmetric_memory_out()
        self._followers.tell(BeginOrder(self.vllm_config, self._meeting))
        super()._init_executor()

    def _distributed_args(self) -> tuple[str, int, int]:
        # Each process sees its own device alone.
        return self._meeting, 0, 0

    def collective_rpc(
        self,
        method: str | Callable[..., Any],
        timeout: float | None = None,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
        non_block: bool = False,
        single_value: bool = False,
    ) -> Any:
        """As vLLM asks; where it asks for a single value, that is the leading rank's.

        Raises:
            UntoldRanksError: it asks for a function, or for answers of all ranks later. No rank has
                done anything then.
            LostError: one of the others is gone.
        """
        if not isinstance(method, str):
            raise UntoldRanksError(
                getattr(method, "__qualname__", repr(method)),
                "functions are not sent to the others",
                "name a method of its workers",
            )
        if non_block and not single_value:
            raise UntoldRanksError(
                method, "answers of several are waited for", "ask for one, or wait"
            )
        self._followers.tell(CallOrder(method, args, kwargs or {}, not single_value))
        own = super().collective_rpc(method, timeout, args, kwargs, non_block, single_value)
        return own if single_value else own + self._followers.answers()

    def tell_ready(self) -> None:
        """Have the others take pages: all blocks are allocated."""
        self._followers.tell(ReadyOrder())

    def shutdown(self) -> None:
        """The others end with their orders."""
        self._followers.close()
        super().shutdown()
