"""Triton kernels run in Triton's interpreter where there is no GPU."""

import os

import pytest
import torch

if not torch.cuda.is_available():
    # Triton decides when it is imported, which other tests do as well.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_addoption(parser: pytest.Parser) -> None:
    """For live tests, whose figures stand in the docs."""
    parser.addoption("--record", action="store_true", help="write what live tests saw into docs/")


@pytest.fixture(scope="session")
def record(request: pytest.FixtureRequest) -> bool:
    """Whether pages get what is seen now."""
    return bool(request.config.getoption("--record"))
