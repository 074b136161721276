"""Sending pages by Ray's object store, with Ray replaced by what it would say."""

from typing import Any
from unittest.mock import Mock

import pytest
import ray
import torch
from ray.exceptions import ObjectStoreFullError

from longreach.cluster.object_store import ObjectStoreSender, PageRun, from_bytes
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


@pytest.mark.parametrize("count", [1, 300])
def test_pages_of_8_bits_arrive_with_their_scales(
    monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    sent: list[PageRun] = []
    monkeypatch.setattr(ray, "put", sent.extend)
    monkeypatch.setattr(ray, "wait", lambda references, num_returns: (references, []))
    monkeypatch.setattr(ray, "get", lambda reference: None)
    sender = ObjectStoreSender(worker=Mock(), request_id="a", max_in_flight_bytes=1 << 20)
    values = torch.randn(count, 2, 2, 128, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(count, 2, 2)
    sender.push(3, 5, 1, values, scales)
    sender.flush()
    [(layer, page, head, data, own)] = sent
    arrived, arrived_scales = from_bytes(data, own, torch.bfloat16)
    assert (layer, page, head) == (3, 5, 1)
    assert torch.equal(arrived.float(), values.float())
    assert arrived_scales is not None
    assert torch.equal(arrived_scales, scales)
