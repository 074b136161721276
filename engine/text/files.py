"""Text files that users name."""

from pathlib import Path

from ..errors import InvalidRequestError


def read_text(path: Path) -> str:
    """The whole of a UTF-8 file.

    Raises:
        InvalidRequestError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InvalidRequestError(f"{path} is not UTF-8 text: {error}; convert it first") from error
    except OSError as error:
        raise InvalidRequestError(f"{path} cannot be read: {error.strerror}") from error
