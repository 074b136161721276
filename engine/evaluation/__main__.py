"""python -m longreach.engine.evaluation: what `longreach eval` does, on a machine without Ray."""

import sys

from ..errors import LongreachError
from .cli import app

try:
    app(prog_name="python -m longreach.engine.evaluation")
except LongreachError as error:
    print(f"longreach: {error}", file=sys.stderr)
    sys.exit(1)
