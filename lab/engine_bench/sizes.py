"""How lengths, batches and meshes are written."""

from ...engine.errors import ConfigurationError
from ..lengths import parse_length


def count(text: str) -> int:
    """Tokens from "1000000", "32K" (of 1,024) or "1M" (of 1,048,576).

    Raises:
        ConfigurationError: it is no such number, or 0.
    """
    try:
        return parse_length(text)
    except ValueError as error:
        raise ConfigurationError(str(error)) from error


def batch(text: str) -> tuple[int, ...]:
    """Lengths from "8x128K" or "1x1M+30x1K".

    Raises:
        ConfigurationError: it is no such batch.
    """
    lengths: list[int] = []
    for group in text.split("+"):
        number, found, length = group.partition("x")
        if not found or not number.strip().isdecimal() or not int(number):
            raise ConfigurationError(f"{text!r} is no batch; write 8x128K or 1x1M+30x1K")
        lengths += [count(length)] * int(number)
    return tuple(lengths)


def mesh(text: str) -> tuple[int, int]:
    """Tensor parallel and sequence parallel ranks from "2x4".

    Raises:
        ConfigurationError: it is no such mesh.
    """
    tensor, _, sequence = text.strip().partition("x")
    if not (tensor.isdecimal() and sequence.isdecimal() and int(tensor) and int(sequence)):
        raise ConfigurationError(f"{text!r} is no mesh; write 1x8 or 2x4")
    return int(tensor), int(sequence)
