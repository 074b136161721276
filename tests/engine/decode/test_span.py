"""A decoder that spans several ranks says what one on a single rank does."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.follower import Follower
from longreach.engine.decode.leader import Followers, LeadingPool, LeadingStep
from longreach.engine.decode.make_step import make_step
from longreach.engine.decode.orders import ForgetOrder
from longreach.engine.decode.step import DecodeStep, HasRun, PromptLimits, PromptPiece, StepRow
from longreach.engine.errors import LostError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import Delta
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.lab.pocket.tokenizer import build_tokenizer

from ...processes import run_ranks
from ..checkpoints import DUAL_CHUNK, make_checkpoint
from .test_decode import make_prompt, make_request, tokens_by_choice

LIMITS = PromptLimits(longest=1024, at_once=256, pieces=4)
MAX_BATCH = 4
CPU = torch.device("cpu")


@dataclass
class RecordingStep(DecodeStep):
    """Keeps whatever logits come out."""

    inner: DecodeStep
    logits: list[np.ndarray] = field(default_factory=list)

    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> HasRun:
        outcomes = self.inner.run(rows, pieces)
        self.logits += [each.copy() for each in outcomes if isinstance(each, np.ndarray)]
        return HasRun(outcomes)


@dataclass
class Said:
    """What came out of one run, and what it did meanwhile."""

    tokens: dict[str, dict[int, list[int]]]
    logits: list[np.ndarray]
    preemptions: int
    usage: float


def poisoned(pool: PagePool) -> PagePool:
    pool.memory.fill_(torch.nan)
    if pool.scales is not None:
        pool.scales.fill_(torch.nan)
    return pool


def work(model: Qwen2, pool: PagePool, step: DecodeStep) -> Said:
    """Requests that come and go: several at a time, of odd lengths, some of which make room."""
    recording = RecordingStep(step)
    decoder = Decoder(model, pool, TokenBytes(build_tokenizer()), MAX_BATCH, LIMITS, step=recording)
    outputs = []
    for names, is_cancelled in (("abcd", False), ("efgh", True)):
        for name, length in zip(names, (1, 129, 255, 383), strict=True):
            prompt = make_prompt(length, seed=length)
            decoder.admit(make_request(name, prompt, max_tokens=12, top_logprobs=2))
            outputs += decoder.step()
        while decoder.has_work and not decoder._put_off:
            outputs += decoder.step()
        assert decoder._put_off, "nobody had to make room"
        if is_cancelled:
            decoder.cancel(decoder._put_off[-1].reservation.request.request_id)
        while decoder.has_work:
            outputs += decoder.step()
    choices = make_request("i", make_prompt(300, seed=5), max_tokens=9, choices=2, seed=1)
    decoder.admit(choices)
    while decoder.has_work:
        outputs += decoder.step()
    said = [each for each in outputs if isinstance(each[1], Delta)]
    tokens = {name: tokens_by_choice(said, name) for name in "abcdefghi"}
    return Said(tokens, recording.logits, decoder.num_preemptions, decoder.usage)


def rank_main(rank: int, ranks: int, folder: Path, kept: KVCacheDtype, output: Path) -> None:
    torch.set_num_threads(1)
    addresses = [str(output / f"channel-{each}") for each in range(1, ranks)]
    listener = Listener(addresses[rank - 1], family="AF_UNIX") if rank else None
    mesh = Mesh.join(ranks, 1, rank, f"file://{output}/meeting")
    model = Qwen2.load(folder, mesh, torch.float32, CPU)
    geometry = model.pages_kept_as(kept)
    if listener is None:
        followers = Followers([Client(address, family="AF_UNIX") for address in addresses])
        pool = LeadingPool(geometry, PAGES, CPU, followers)
        step = LeadingStep(make_step(model, pool, MAX_BATCH, LIMITS), followers)
        torch.save(work(model, poisoned(pool), step), output / "said.pt")
        followers.close()
    else:
        pool = poisoned(PagePool(geometry, PAGES, CPU))
        follower = Follower(pool, make_step(model, pool, MAX_BATCH, LIMITS))
        follower.follow(listener.accept())
        assert follower.num_aside == 0
        listener.close()
    mesh.close()


PAGES = 9


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("span"), DUAL_CHUNK, kv_heads=4, heads=8)


@pytest.mark.parametrize(("ranks", "kept"), [(2, "auto"), (4, "auto"), (2, "fp8_e4m3")])
def test_several_ranks_say_what_one_does(
    ranks: int, kept: KVCacheDtype, folder: Path, tmp_path: Path
) -> None:
    model = Qwen2.load(folder, Mesh.single(), torch.float32, CPU)
    pool = poisoned(PagePool(model.pages_kept_as(kept), PAGES, CPU))
    alone = work(model, pool, make_step(model, pool, MAX_BATCH, LIMITS))
    run_ranks(rank_main, (ranks, folder, kept, tmp_path), ranks)
    said: Said = torch.load(tmp_path / "said.pt", weights_only=False)
    assert said.tokens == alone.tokens
    assert said.preemptions == alone.preemptions > 0
    assert said.usage == 0
    assert len(said.logits) == len(alone.logits) > 80
    for found, expected in zip(said.logits, alone.logits, strict=True):
        # Ranks add up in another order, in float32; numbers of 8 bits may be rounded otherwise.
        limit = 3e-4 if kept == "auto" else 3e-2
        np.testing.assert_allclose(found, expected, rtol=limit, atol=limit)


class _Broken(DecodeStep):
    def launch(self, rows: Sequence[StepRow], pieces: Sequence[PromptPiece] = ()) -> HasRun:
        raise torch.OutOfMemoryError("CUDA out of memory")


def test_a_step_that_failed_on_one_rank_is_not_run_again(folder: Path) -> None:
    """The others may wait for it in a collective: nothing can go on there."""
    model = Qwen2.load(folder, Mesh.single(), torch.float32, CPU)
    pool = PagePool(model.page_geometry, PAGES, CPU)
    step = LeadingStep(_Broken(), Followers([]))
    decoder = Decoder(model, pool, TokenBytes(build_tokenizer()), MAX_BATCH, LIMITS, step=step)
    decoder.admit(make_request("a", make_prompt(5)))
    with pytest.raises(LostError):
        decoder.step()


def test_a_follower_that_is_gone_is_noticed(tmp_path: Path) -> None:
    address = str(tmp_path / "channel")
    with Listener(address, family="AF_UNIX") as listener:
        client = Client(address, family="AF_UNIX")
        listener.accept().close()
    followers = Followers([client])
    with pytest.raises(LostError):
        followers.tell(ForgetOrder(1))
