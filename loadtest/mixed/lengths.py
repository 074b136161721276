"""Lengths in tokens as people write them: 1K is 1,024, 1M is 1,048,576."""

_UNITS = {"M": 1 << 20, "K": 1 << 10}


def parse_length(text: str) -> int:
    """Tokens of "64K".

    Raises:
        ValueError: it is no such length.
    """
    number, unit = text.strip(), 1
    if number[-1:].upper() in _UNITS:
        number, unit = number[:-1], _UNITS[number[-1].upper()]
    if not number.isdecimal() or not int(number):
        raise ValueError(f"{text!r} is no length in tokens; a length is 1000, 64K or 1M")
    return int(number) * unit


def format_length(tokens: int) -> str:
    """The shortest way to write a length exactly."""
    for letter, unit in _UNITS.items():
        if tokens >= unit and tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return str(tokens)
