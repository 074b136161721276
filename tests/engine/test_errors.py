"""What one error says within the sentence of another."""

import pytest

from longreach.engine.errors import in_one_line


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
def test_an_error_is_told_in_one_line(error: Exception, said: str) -> None:
    assert in_one_line(error).removeprefix("CUDA error: ") == said
