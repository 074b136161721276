from pathlib import Path

import pytest

from .backend import Endpoint


@pytest.fixture
def endpoint(tmp_path: Path) -> Endpoint:
    return Endpoint(tmp_path)
