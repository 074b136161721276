"""Draws the house: python -m longreach.lab.house, in the folder of the repository."""

import argparse
from pathlib import Path

from .imports import House
from .picture import draw


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(
        prog="python -m longreach.lab.house", description="Draw the house from its imports."
    )
    parser.add_argument("--root", type=Path, default=Path(), help="the repository's folder")
    parser.add_argument("--out", type=Path, help="the picture; else docs/house.svg below the root")
    options = parser.parse_args()
    out = options.out or options.root / "docs" / "house.svg"
    out.write_text(draw(House.read(options.root)), encoding="utf-8")
    print(out)


if __name__ == "__main__":
    main()
