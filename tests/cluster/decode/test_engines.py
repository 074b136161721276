"""Which engine a worker has, by its settings."""

import pickle
import uuid
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from multiprocessing.connection import Listener
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from longreach.cluster.decode import engines
from longreach.cluster.decode.engines import FOLLOWERS, GROUP, make_engine, make_following_rank
from longreach.cluster.decode.meeting import WorkerMeeting
from longreach.cluster.remedies import remedied
from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.orders import Channel
from longreach.engine.decode.step import PromptLimits
from longreach.engine.errors import ConfigurationError, LostError, NoVllmError
from longreach.engine.kv.pages import PageGeometry
from longreach.engine.model.files import ModelFiles
from longreach.kernels.page_size import PAGE_TOKENS

from ..conftest import make_settings

SETTINGS = make_settings(1)
KEPT: Any = object()
"""Whoever keeps figures; nothing is told here."""
SMALL = {"kv_cache_tokens": 1024, "prefill_up_to": 512, "max_batch": 3}


def worker_settings(engine: str, **model: Any) -> Any:
    decode = SETTINGS.decode.model_copy(update={**SMALL, "engine": engine})
    changed = {"decode": decode, "model": SETTINGS.model.model_copy(update=model)}
    return SETTINGS.model_copy(update=changed).worker


def test_the_own_one_is_made_unless_another_is_asked_for() -> None:
    engine = make_engine(worker_settings("native"), KEPT)
    assert isinstance(engine, Decoder)


@pytest.mark.parametrize(
    ("model", "kept"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "auto"}, torch.bfloat16),
        ({"dtype": "bfloat16"}, torch.bfloat16),
    ],
)
def test_another_one_is_started_by_whoever_declares_it(
    monkeypatch: pytest.MonkeyPatch, model: dict[str, Any], kept: torch.dtype
) -> None:
    asked: list[Any] = []

    def start(*given: Any, on_gpu: bool) -> str:
        asked.extend((*given, on_gpu))
        return "the engine"

    declare(monkeypatch, GROUP, start)
    assert make_engine(worker_settings("vllm", **model), KEPT) == "the engine"
    files, pages, num_pages, max_batch, prompts, figures, followers, on_gpu = asked
    assert files == ModelFiles.of("pocket")
    assert pages == PageGeometry(pages.num_layers, pages.num_kv_heads, pages.head_dim, kept)
    assert (num_pages, max_batch, on_gpu) == (1024 // PAGE_TOKENS, 3, False)
    assert prompts == PromptLimits(512, 512, alone=512)
    assert figures is KEPT
    assert followers is None


def declare(monkeypatch: pytest.MonkeyPatch, group: str, what: Callable[..., Any]) -> None:
    """Have what is installed declare an engine of the name vllm."""

    class Entry:
        def load(self) -> Any:
            return what

    def declared(**asked: str) -> list[Entry]:
        assert asked == {"group": group, "name": "vllm"}
        return [Entry()]

    monkeypatch.setattr(engines, "entry_points", declared)


def test_another_one_spans_ranks_that_are_there_already(monkeypatch: pytest.MonkeyPatch) -> None:
    """The leader has ways to give orders on; each rank has the pages of its own heads."""
    settings = worker_settings("vllm", dtype="float32")
    decode = settings.decode.model_copy(update={"tensor_parallel": 2})
    settings = replace(settings, decode=decode)
    asked: list[Any] = []

    def start(*given: Any, on_gpu: bool) -> str:
        asked.extend(given)
        return "the engine"

    def follow(rank: int, orders: Channel) -> tuple[str, str]:
        assert pickle.loads(orders.recv_bytes()) == "an order"
        return f"rank {rank}", "its pages"

    key, address = b"key", f"\0longreach-{uuid.uuid4().hex}"
    channel = Listener(address, "AF_UNIX", authkey=key)
    declare(monkeypatch, FOLLOWERS, follow)
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(make_following_rank, settings, 1, Mock(), channel)
        declare(monkeypatch, GROUP, start)
        meeting = WorkerMeeting(("", 0), (address,), key)
        assert make_engine(settings, KEPT, meeting) == "the engine"
        _, pages, *_, followers = asked
        assert pages.num_kv_heads == 1
        followers.tell("an order")
        rank, its_pages, orders = following.result(20)
        assert (rank, its_pages) == ("rank 1", "its pages")
        orders.send_bytes(pickle.dumps("an answer"))
        assert followers.answers() == ["an answer"]
        orders.close()
        with pytest.raises(LostError):
            followers.answers()


def test_ranks_that_a_model_cannot_be_cut_into_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = worker_settings("vllm")
    decode = settings.decode.model_copy(update={"tensor_parallel": 3})
    declare(monkeypatch, GROUP, Mock())
    with pytest.raises(ConfigurationError, match="one of 1, 2"):
        make_engine(replace(settings, decode=decode), KEPT)


def test_one_that_nobody_declares_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "entry_points", lambda group, name: [])
    with pytest.raises(NoVllmError) as refused:
        make_engine(worker_settings("vllm"), KEPT)
    assert "set decode.engine: native" in str(remedied(refused.value))
