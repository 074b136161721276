"""Sending pages by Ray's object store, with Ray replaced by what it would say."""

from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch
from ray.exceptions import ObjectStoreFullError

from longreach.cluster.object_store import ObjectStoreSender
from longreach.engine.errors import TransferError


def test_a_full_object_store_is_remembered_and_not_raised_by_push(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that left its chunk half-way would leave the others waiting for it."""

    def put(value: Any) -> None:
        raise ObjectStoreFullError("no space left")

    monkeypatch.setattr(ray, "put", put)
    sender = ObjectStoreSender(worker=Mock(), request_id="a", max_in_flight_bytes=1 << 20)
    pages = torch.zeros(64, 2, 2, 128, 64)  # more than is collected before it is sent
    sender.push(0, 0, 0, pages)
    sender.push(1, 0, 0, pages)
    assert sender.failure is not None
    with pytest.raises(TransferError, match="no space left"):
        sender.flush()
