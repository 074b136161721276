"""The JSON files of a checkpoint folder."""

import json
from pathlib import Path
from typing import Any

from .errors import CheckpointError


def read_json(path: Path) -> Any:
    """Parse one JSON file of a checkpoint.

    Raises:
        CheckpointError: it is missing or malformed.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist; name a checkpoint folder") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} is not valid JSON: {error}") from error
