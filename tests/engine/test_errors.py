"""What an error carries from process to process, and says within the sentence of another."""

import inspect
import pickle
from dataclasses import fields, is_dataclass
from typing import Any, cast

import pytest

from longreach.engine import errors
from longreach.engine.errors import (
    CacheTooSmallError,
    DoesNotFitError,
    FactualError,
    LongreachError,
    MemoryNeeds,
    OutOfPagesError,
    PageFormatError,
    QueueFullError,
    ReceiveOutOfMemoryError,
    RefusedPagesError,
    TransferError,
    in_one_line,
)

NEEDS = MemoryNeeds("decode", 1, 2, 3, 4, 5, 6, quantized=True)


class OtherProcessError(Exception):
    """As Ray raises it: its words are a trace, and its cause what was raised there."""

    def __init__(self, cause: BaseException | None) -> None:
        super().__init__("ray::copy()\n  File ...")
        self.cause = cause


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("CUDA error: invalid argument\nCompile with ..."), "invalid argument"),
        (RuntimeError("\n  it did not work \n"), "it did not work"),
        (KeyError(), "KeyError"),
        (ValueError("\n"), "ValueError"),
        (OtherProcessError(RuntimeError("no room\nas told")), "no room"),
        (OtherProcessError(OtherProcessError(KeyError())), "KeyError"),
        (OtherProcessError(None), "ray::copy()"),
    ],
)
def test_an_error_is_said_in_one_line(error: Exception, said: str) -> None:
    assert in_one_line(error).removeprefix("CUDA error: ") == said


@pytest.mark.parametrize(
    "error",
    [
        OutOfPagesError(needed=3, free=1, total=2),
        QueueFullError(3, retry_after=7),
        CacheTooSmallError("prefill", needed=2, total=1),
        DoesNotFitError(NEEDS, largest_cache=9),
        ReceiveOutOfMemoryError("a"),
        TransferError("in words"),
    ],
    ids=lambda error: type(error).__name__,
)
@pytest.mark.parametrize("remedy", [None, "lower something"])
def test_errors_come_out_of_a_pickle_as_they_went_in(
    error: LongreachError, remedy: str | None
) -> None:
    """With names or without in the call: numbers, words, and what was added later."""
    error.remedy = remedy
    other = pickle.loads(pickle.dumps(error))
    assert type(other) is type(error)
    assert vars(other) == vars(error)
    assert str(other) == str(error)
    assert str(other).endswith("; lower something") == (remedy is not None)


OURS = [
    each
    for _, each in inspect.getmembers(errors, inspect.isclass)
    # What is made of facts and names none is what others have in common.
    if issubclass(each, LongreachError) and is_dataclass(each) == issubclass(each, FactualError)
]


@pytest.mark.parametrize("error", OURS)
def test_every_error_comes_out_of_a_pickle(error: type[LongreachError]) -> None:
    """One that does not is lost on its way, and what comes in its stead means something else."""
    facts = [1 for _ in fields(error)] if is_dataclass(error) else ["in words"]
    raised = cast(Any, error)(*facts)
    other = pickle.loads(pickle.dumps(raised))
    assert type(other) is error
    assert vars(other) == vars(raised)


def test_an_error_within_an_error_comes_along() -> None:
    error = RefusedPagesError("a", "layer 1", PageFormatError("float32", "bfloat16"))
    other = pickle.loads(pickle.dumps(error))
    assert vars(other.reason) == {"came": "float32", "kept": "bfloat16"}
    assert str(other) == str(error)
