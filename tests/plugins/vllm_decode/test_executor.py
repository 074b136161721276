"""Where the ranks of a vLLM that spans several devices meet: `make test-vllm`."""

from typing import TYPE_CHECKING, Any

import pytest
from torch.distributed import (  # pyright: ignore[reportPrivateImportUsage]
    DistNetworkError,
    TCPStore,
    rendezvous,
)

from longreach.engine.decode.leader import Followers

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.executor import LeadingExecutor

pytestmark = pytest.mark.live


@pytest.fixture
def executor(monkeypatch: pytest.MonkeyPatch) -> "LeadingExecutor":
    """Before it begins: vLLM's would load a model."""
    from longreach.plugins.vllm_decode.executor import LeadingExecutor

    monkeypatch.setattr(LeadingExecutor.__base__, "__init__", lambda *given: None)
    return LeadingExecutor(Followers(()), None)


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
