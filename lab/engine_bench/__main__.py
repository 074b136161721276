"""The command line of the engine's benchmark."""

import sys

import torch

from ...engine.errors import LongreachError
from . import mesh, prompts, scaling, span
from .options import parse
from .remedies import remedied


def main(arguments: list[str] | None = None) -> bool:
    """Measure, print, and add to a CSV file; whether every case could be run."""
    options = parse(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if options.what == "scaling":
        scaling.predict(options, device)
        return True
    if options.what == "mesh":
        mesh.measure(options)
        return True
    if options.what == "span":
        span.measure(options)
        return True
    return prompts.measure(options, device)


if __name__ == "__main__":
    try:
        sys.exit(0 if main() else 1)
    except LongreachError as error:
        print(f"longreach: {remedied(error)}", file=sys.stderr)
        sys.exit(1)
