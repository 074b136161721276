"""python -m longreach.lab.evaluation: what `longreach eval` does, on a machine without Ray."""

import sys

from ...engine.errors import LongreachError
from .cli import app

try:
    app(prog_name="python -m longreach.lab.evaluation")
except LongreachError as error:
    print(f"longreach: {error}", file=sys.stderr)
    sys.exit(1)
