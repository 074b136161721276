# pyright: reportMissingImports=false
# vLLM is installed in an environment of its own.
"""How the ranks of a vLLM that spans several devices meet, and sum: `make test-vllm`."""

from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed import (  # pyright: ignore[reportPrivateImportUsage]
    DistNetworkError,
    TCPStore,  # pyright: ignore[reportPrivateImportUsage]
)
from torch.distributed.rendezvous import rendezvous

from longreach.engine.decode.leader import Followers
from longreach.engine.model.pocket import CHECKPOINT
from longreach.plugins.vllm_decode.errors import UntoldRanksError

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.executor import LeadingExecutor

pytestmark = pytest.mark.live


class Refusing:
    """The way to another rank, which nothing may be sent by."""

    def send_bytes(self, message: bytes) -> None:
        raise AssertionError("a rank was told")

    def recv_bytes(self) -> bytes:
        raise AssertionError("a rank was asked")

    def close(self) -> None:
        """Nothing is open."""


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> "LeadingExecutor":
    """Before it begins: vLLM's would load a model."""
    from longreach.plugins.vllm_decode.executor import LeadingExecutor

    monkeypatch.setattr(LeadingExecutor.__base__, "__init__", lambda *given: None)
    return LeadingExecutor(Followers((Refusing(),)), None)


def meeting_of(executor: "LeadingExecutor") -> tuple[str, int]:
    method: Any = executor._distributed_args()[0]
    return method, int(method.rpartition(":")[2])


def test_nobody_else_gets_the_port_where_ranks_meet(executor: "LeadingExecutor") -> None:
    _, port = meeting_of(executor)
    with pytest.raises(DistNetworkError):
        TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)


def test_the_leading_rank_meets_the_others_there(executor: "LeadingExecutor") -> None:
    """As torch does for vLLM, which only names the port."""
    method, port = meeting_of(executor)
    leading, *_ = next(rendezvous(method, 0, 1))
    following = TCPStore("127.0.0.1", port)
    leading.set("said", "here")
    assert following.get("said") == b"here"


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        (len, {}, "functions are not sent to the others; name a method"),
        ("sleep", {"non_block": True}, "answers of several are waited for; ask for one, or wait"),
    ],
)
def test_what_the_others_cannot_be_told_is_refused_before_any_rank_does_it(
    executor: "LeadingExecutor", method: Any, options: dict[str, Any], said: str
) -> None:
    """vLLM's interface lets anybody ask; and so under `python -O` as well."""
    with pytest.raises(UntoldRanksError, match=said):
        executor.collective_rpc(method, **options)


def test_ranks_sum_by_nccl_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever else vLLM has on GPUs wants each process to see the others' devices."""
    from vllm.envs import environment_variables

    from longreach.plugins.vllm.registration import register
    from longreach.plugins.vllm_decode.sums import leave_symmetric_memory_out
    from longreach.plugins.vllm_decode.vllm_core import engine_arguments

    register()
    made = engine_arguments(8, 2**20, 2, model=str(CHECKPOINT), dtype="float32", max_model_len=1024)
    assert made.disable_custom_all_reduce
    assert made.compilation_config.pass_config.fuse_allreduce_rms is False
    monkeypatch.setenv("VLLM_ALLREDUCE_USE_SYMM_MEM", "1")
    leave_symmetric_memory_out()
    # As vLLM reads it, which keeps what it has read once an engine was started in this process.
    assert environment_variables["VLLM_ALLREDUCE_USE_SYMM_MEM"]() is False
