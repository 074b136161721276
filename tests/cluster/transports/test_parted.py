"""One prompt's pages in two processes' pools, by every transport: there, and back again."""

from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
import ray
import torch

from longreach.cluster.decode.further_ranks import FurtherRanks
from longreach.cluster.prefill.rank import Meeting, PrefillRank
from longreach.cluster.prefill.scheduler import Chunk
from longreach.cluster.settings import Settings
from longreach.cluster.transports import make_receiver
from longreach.engine.decode.follower import FollowerPages
from longreach.engine.kv.destination import Destination
from longreach.engine.kv.pages import PageGeometry, PagePool
from longreach.kernels.page_size import pages_for
from longreach.kernels.pages import BlockTable

from .pair import CHUNK_TOKENS, Handle, chunks_of, make_prompt, replace_ray, settings_of

PROMPT = make_prompt(2301)
TABLE = BlockTable.of([7, 3, *range(20, 20 + pages_for(len(PROMPT)) - 2)])
CPU = torch.device("cpu")


class Rank:
    """One rank of a decode worker, as prefill ranks see it."""

    def __init__(self, settings: Settings, geometry: PageGeometry, head: int) -> None:
        pool = PagePool(geometry, 64, CPU)
        pool.memory.zero_()
        self.pages = FollowerPages(pool, head)
        self.pages.expect("a", TABLE)
        self.handle = Handle(deliver=self.deliver, send_back=self.send_back)
        host = ray.util.get_node_ip_address()
        self.receiver = make_receiver(settings.transport, self.handle, host, self.pages)

    def deliver(self, request_id: str, epoch: int, message: Any) -> Future[Any]:
        return done(lambda: self.receiver.receive(request_id, message))

    def send_back(self, request_id: str, epoch: int, message: Any) -> Future[Any]:
        return done(lambda: self.receiver.send_back(request_id, message))


def done(work: Any) -> Future[Any]:
    future: Future[Any] = Future()
    future.set_result(work())
    return future


def make_rank(settings: Settings) -> PrefillRank:
    rank = PrefillRank(settings.gangs[0])
    rank.join(Meeting.of_one(), 0, 1)
    rank._prefiller._pool.clear()
    return rank


def prefill(rank: PrefillRank, destination: Destination, back: int = 0) -> np.ndarray:
    """Logits of the prompt, whose first chunks are fetched."""
    result = None
    for number in chunks_of(PROMPT):
        start, end = number * CHUNK_TOKENS, min((number + 1) * CHUNK_TOKENS, len(PROMPT))
        turn = Chunk("a", start, end, end == len(PROMPT), is_back=number < back)
        first = number == 0
        rank.begin_chunk(turn, PROMPT if first else None, destination if first else None)
        result = rank.finish_chunk(turn)
        assert result.failure is None
    assert rank.flush("a") is None
    assert result is not None
    assert result.logits is not None
    return result.logits


@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("transport", ["object_store", "cuda_ipc", "nixl"])
def test_each_rank_gets_its_heads_and_gives_them_back(
    transport: str, kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace_ray(monkeypatch)
    settings = settings_of(transport, kept)
    first = make_rank(settings)
    whole = first._prefiller._pool
    own = PageGeometry(whole.geometry.num_layers, 1, whole.geometry.head_dim, whole.geometry.dtype)
    leader, follower = (Rank(settings, own, head) for head in (0, 1))
    further = FurtherRanks([follower.handle], leader.pages)
    destination = further.destination(leader.receiver.destination("a", 0, 0), 0)
    expected = prefill(first, destination)
    table = first._prefiller._admitted["a"].table.pages
    for head, rank in enumerate((leader, follower)):
        assert rank.pages.complete_tokens("a") == len(table) * 128
        for layer in range(own.num_layers):
            sent = whole.layer(layer).heads(head, 1).at(torch.from_numpy(table))
            came = rank.pages.pool.layer(layer).at(torch.from_numpy(TABLE.pages))
            assert torch.equal(came.bits.view(torch.uint8), sent.bits.view(torch.uint8))
            if sent.scales is not None and came.scales is not None:
                torch.testing.assert_close(came.scales, sent.scales)
    first.release("a")
    whole.clear()
    np.testing.assert_array_equal(prefill(make_rank(settings), destination, back=2), expected)
