"""An endpoint that answers as it is told to."""

from collections.abc import Iterator

import pytest

from .endpoint import Script, scripted_endpoint


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def port(script: Script) -> Iterator[int]:
    with scripted_endpoint(script) as made:
        yield made
