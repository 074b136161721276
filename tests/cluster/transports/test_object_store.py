"""Sending pages by Ray's object store, with Ray replaced by what it would say."""

from collections.abc import Sequence
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import ObjectStoreFullError, RayError, RayTaskError

from longreach.cluster.messages import WorkerDestination
from longreach.cluster.transports import actor_messages
from longreach.cluster.transports.actor_messages import WantedPages
from longreach.cluster.transports.object_store import (
    ObjectStoreReceiver,
    ObjectStoreSender,
    PageRun,
)
from longreach.engine.errors import ReceiveOutOfMemoryError, TransferError
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages, Pages, page_index


def held(pages: Pages, numbers: list[int]) -> HeldPages:
    """Some of a layer's pages."""
    index = np.array(numbers, dtype=np.int64)
    return HeldPages(pages, index, page_index(index, pages.values.device))


def test_a_full_object_store_is_remembered_and_not_raised_by_push(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A rank that left its chunk half-way would leave the others waiting for it."""

    def put(value: Any) -> None:
        raise ObjectStoreFullError("no space left")

    monkeypatch.setattr(ray, "put", put)
    sender = ObjectStoreSender(1 << 20).open(WorkerDestination("a", 0, Mock(), 0))
    layer = Pages(torch.zeros(64, 2, 2, 128, 64))
    pages = held(layer, list(range(64)))  # more than is collected before it is sent
    sender.push(Place(0, 0, 0), pages)
    sender.push(Place(1, 0, 0), pages)
    assert sender.failure is not None
    with pytest.raises(TransferError):
        sender.flush()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RayError(), "RayError"),
        (RayTaskError("receive", "a trace", RuntimeError("CUDA error\nCompile with ...")), "error"),
    ],
)
def test_what_a_worker_answers_is_told_in_one_line(
    monkeypatch: pytest.MonkeyPatch, error: RayError, said: str
) -> None:
    monkeypatch.setattr(ray, "put", Mock())
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", Mock(side_effect=error))
    sender = ObjectStoreSender(1 << 20).open(WorkerDestination("a", 0, Mock(), 0))
    sender.push(Place(0, 0, 0), held(Pages(torch.zeros(1, 1, 2, 128, 4)), [0]))
    with pytest.raises(TransferError) as told:
        sender.flush()
    assert str(told.value).startswith("pages did not reach the decode worker: ")
    assert str(told.value).endswith(said)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("numbers", [[7], range(2, 290), [3, 1, 2]], ids=["one", "run", "apart"])
def test_pages_of_8_bits_arrive_with_their_scales(
    monkeypatch: pytest.MonkeyPatch, numbers: Sequence[int]
) -> None:
    sent: list[PageRun] = []
    monkeypatch.setattr(ray, "put", sent.extend)
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", lambda reference: None)
    sender = ObjectStoreSender(1 << 20).open(WorkerDestination("a", 0, Mock(), 0))
    values = torch.randn(290, 2, 2, 128, 64).to(torch.float8_e4m3fn)
    scales = torch.rand(290, 2, 2)
    sender.push(Place(3, 5, 1), held(Pages(values, scales), list(numbers)))
    sender.flush()
    [run] = sent
    assert run.place == Place(3, 5, 1)
    assert torch.equal(run.pages.values.float(), values.float()[list(numbers)])
    assert run.pages.scales is not None
    assert torch.equal(run.pages.scales, scales[list(numbers)])


def test_a_worker_that_answers_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else whoever waits for its pages would wait for good."""
    asked: list[float] = []

    def wait(references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        asked.append(timeout)
        return [], references

    monkeypatch.setattr(ray, "put", Mock())
    monkeypatch.setattr(ray, "wait", wait)
    hand_off = ObjectStoreSender(1 << 20).open(WorkerDestination("a", 0, Mock(), 0))
    hand_off.push(Place(0, 0, 0), held(Pages(torch.zeros(1, 1, 2, 128, 4)), [0]))
    with pytest.raises(TransferError):
        hand_off.flush()
    assert asked == [actor_messages.ANSWER_SECONDS]
    with pytest.raises(TransferError):
        hand_off.flush()
    assert len(asked) == 1, "not waited for once more"


def test_no_more_bytes_are_under_way_than_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    most, under_way = 0, 0

    def deliver(request_id: str, epoch: int, message: Any) -> object:
        nonlocal most, under_way
        under_way += 1
        most = max(most, under_way)
        return object()

    def wait(references: list[Any], timeout: float) -> tuple[list[Any], list[Any]]:
        nonlocal under_way
        under_way -= 1
        return references[:1], references[1:]

    monkeypatch.setattr(ray, "put", Mock())
    monkeypatch.setattr(ray, "wait", wait)
    monkeypatch.setattr(ray, "get", Mock())
    worker = Mock()
    worker.deliver.remote = deliver
    hand_off = ObjectStoreSender(3 << 20).open(WorkerDestination("a", 0, worker, 0))
    layer = Pages(torch.zeros(8, 2, 2, 128, 64))  # a MiB
    for number in range(10):
        hand_off.push(Place(number, 0, 0), held(layer, list(range(8))))
    hand_off.flush()
    assert most == 3


def test_a_worker_without_memory_for_pages_on_their_way_back_ends_one_request() -> None:
    """Whatever else is raised counts as a device that has broken, and ends the worker."""
    pages = Mock()
    pages.held.return_value.read.side_effect = torch.OutOfMemoryError("CUDA out of memory")
    receiver = ObjectStoreReceiver(Mock(), pages)
    with pytest.raises(ReceiveOutOfMemoryError) as raised:
        receiver.send_back("a", [WantedPages(Place(0, 0, 0), 1, 1)])
    assert raised.value.request_id == "a"
