"""What every Python script here begins with: where the endpoint is, and checks by name."""

import sys
import traceback
from collections.abc import Callable
from pathlib import Path

BASE_URL, MODEL = sys.argv[1], sys.argv[2]
"""With `/v1`; the model that is served."""

CHECKPOINT = str(Path(__file__).parents[3] / "engine/model/pocket/checkpoint")
"""The bundled model's folder, for what wants its tokenizer."""

TEXT = "The pass key is 4711. Remember it. What is the pass key?"
MOST_TOKENS = 24

_failed: list[str] = []


def check(name: str, run: Callable[[], object]) -> None:
    """Run one; it fails by raising."""
    try:
        run()
    except Exception:
        _failed.append(name)
        print(f"FAILED {name}", flush=True)
        traceback.print_exc()
    else:
        print(f"ok {name}", flush=True)


def end() -> None:
    """With the status that says whether all was well."""
    sys.exit(1 if _failed else 0)
