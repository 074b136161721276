"""What stands before and behind every call of a gang's at a process that has pages."""

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from ...engine.errors import LongreachError, TransferError

T = TypeVar("T")


def check_epoch(request_id: str, own: int | None, epoch: int) -> None:
    """Refuse a message of a gang that was given up.

    Args:
        own: the epoch of the request; None where it takes no pages.

    Raises:
        TransferError: the request takes none, or goes on with another gang.
    """
    if own is None:
        raise TransferError(f"request {request_id} takes no pages; it was cancelled")
    if own != epoch:
        raise TransferError(f"request {request_id} goes on with another gang")


async def unless_broken(
    work: Coroutine[Any, Any, T], on_failure: Callable[[BaseException], None]
) -> T:
    """What a copy says; `on_failure` hears of what is no fault of its request's.

    A device that no longer works fails every request here, and no step ever finds out.
    """
    try:
        return await work
    except LongreachError:
        raise
    except Exception as error:
        on_failure(error)
        raise
