"""What callers are told when another process fails them."""

import asyncio
from collections.abc import AsyncGenerator

import pytest
from ray.exceptions import (
    ActorDiedError,
    OwnerDiedError,
    RayTaskError,
    TaskCancelledError,
    WorkerCrashedError,
)
from ray.serve.exceptions import RayServeException, RequestCancelledError

from longreach.cluster import call_errors as failures
from longreach.engine.errors import (
    CancelledElsewhereError,
    PromptTooLongError,
    QueueFullError,
    UnavailableError,
)


def raised_by(cause: Exception, calls: int) -> Exception:
    """As it arrives through so many calls, one within the other."""
    error = cause
    for _ in range(calls):
        error = RayTaskError("generate", "Traceback ...", error).as_instanceof_cause()
    return error


@pytest.mark.parametrize("calls", [1, 2, 3])
@pytest.mark.parametrize("cause", [PromptTooLongError("shorten it"), QueueFullError(3)])
def test_errors_on_purpose_arrive_as_they_were_raised(cause: Exception, calls: int) -> None:
    assert failures.as_ours(raised_by(cause, calls)) is cause


@pytest.mark.parametrize("cause", [TaskCancelledError(), RequestCancelledError("id")])
def test_a_cancellation_is_no_failure_of_a_part(
    cause: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    """Ordinary clients that leave cause one each."""
    assert isinstance(failures.as_ours(cause), CancelledElsewhereError)
    assert not caplog.records


@pytest.mark.parametrize("calls", [0, 2])
@pytest.mark.parametrize(
    ("cause", "said"),
    [
        (ActorDiedError(), "died; send the request again"),
        (OwnerDiedError("id", b"", ""), "died; send the request again"),
        (RayServeException("gone"), "not up; send the request again"),
        (WorkerCrashedError(), "its log says why"),
        (ZeroDivisionError("secret"), "its log says why"),
    ],
)
def test_other_errors_say_no_more_than_a_stranger_may_know(
    cause: Exception, said: str, calls: int
) -> None:
    ours = failures.as_ours(raised_by(cause, calls))
    assert isinstance(ours, UnavailableError)
    assert said in str(ours)
    assert "secret" not in str(ours)
    assert "Traceback" not in str(ours)


def test_a_call_that_no_replica_takes_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    async def stream(seconds: float) -> AsyncGenerator[str, None]:
        await asyncio.sleep(seconds)
        yield "taken"

    monkeypatch.setattr(failures, "_ROUTING_SECONDS", 0.05)
    assert asyncio.run(failures.first_of(stream(0))) == "taken"
    with pytest.raises(UnavailableError):
        asyncio.run(failures.first_of(stream(60)))
