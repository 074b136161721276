"""The tree, as its imports say it is."""

from pathlib import Path

import pytest

from longreach.lab.house.imports import House


@pytest.fixture(scope="session")
def house() -> House:
    return House.read(Path(__file__).parents[2])
