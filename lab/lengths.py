"""Lengths in tokens as people write them: 1K is 1,024, 1M is 1,048,576."""

_UNITS = {"M": 1 << 20, "K": 1 << 10}


def parse_length(text: str) -> int:
    """Tokens of "1000000", "32K" or "1M".

    Raises:
        ValueError: it is no such number, or 0.
    """
    number = text.strip()
    unit = _UNITS.get(number[-1:].upper())
    number = number if unit is None else number[:-1]
    if not number.isdecimal() or not int(number):
        raise ValueError(f"{text!r} is no number of tokens; write 1000000, 32K or 1M")
    return int(number) * (unit or 1)


def format_length(tokens: int) -> str:
    """As "32K" or "1M" where it is a whole number of these, else as it is."""
    for letter, unit in _UNITS.items():
        if tokens % unit == 0:
            return f"{tokens // unit}{letter}"
    return f"{tokens:,}"
