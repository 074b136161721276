"""Any mesh hands off to any number of decode ranks, each head to whoever holds it, and back."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Client, Listener
from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.follower import Follower, FollowerPages
from longreach.engine.decode.leader import Followers, LeadingPool, LeadingStep
from longreach.engine.decode.make_step import make_step
from longreach.engine.errors import RefusedPagesError, TransferError
from longreach.engine.kv.destination import Destination, Part, PartedDestination
from longreach.engine.kv.hand_off import HandOff, Place, Sender
from longreach.engine.kv.pages import HeldPages, PageGeometry, PagePool, Pages
from longreach.engine.kv.parted import PartedHandOff, PartedSender
from longreach.engine.local import DirectHandOff, LocalPrefill
from longreach.engine.messages import Delta
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels.pages import BlockTable
from longreach.lab.pocket.tokenizer import build_tokenizer

from ...processes import run_ranks
from ..checkpoints import DUAL_CHUNK, make_checkpoint
from ..decode.test_decode import make_prompt, make_request, tokens_by_choice

PROMPT = np.array(make_prompt(700, seed=3), dtype=np.int32)
CHUNK, PAGES, KV_HEADS = 256, 10, 4
CPU = torch.device("cpu")
Pushed = list[tuple[Place, torch.Tensor]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("parted"), DUAL_CHUNK, kv_heads=KV_HEADS, heads=8
    )


@dataclass(eq=False)
class Recording(HandOff):
    """Keeps what is pushed."""

    pushed: Pushed = field(default_factory=list)
    failed: str | None = None
    calls: list[str] = field(default_factory=list)

    @property
    def failure(self) -> str | None:
        return self.failed

    def push(self, place: Place, pages: HeldPages) -> None:
        self.pushed.append((place, pages.read().values.clone()))

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        raise AssertionError("nothing is fetched")

    def flush(self) -> None:
        self.calls.append("flush")

    def abandon(self) -> None:
        self.calls.append("abandon")


def parts_of(ranks: int) -> list[range]:
    own = KV_HEADS // ranks
    return [range(rank * own, (rank + 1) * own) for rank in range(ranks)]


def prefill(local: LocalPrefill, hand_off: HandOff) -> np.ndarray:
    local.prefiller.admit("a", PROMPT)
    logits = None
    for start in range(0, len(PROMPT), CHUNK):
        end = min(start + CHUNK, len(PROMPT))
        logits = local.prefiller.run_chunk("a", start, end, hand_off).logits
    local.prefiller.release("a")
    assert logits is not None
    return logits.numpy()


def rank_main(
    rank: int, prefill_mesh: tuple[int, int], ranks: int, folder: Path, output: Path
) -> None:
    """Prefill on the first of all processes, then decode on the first `ranks`."""
    torch.set_num_threads(1)
    prefilling = math.prod(prefill_mesh)
    logits = np.empty(0)
    if rank < prefilling:
        mesh = Mesh.join(*prefill_mesh, rank, f"file://{output}/prefill")
        recorded = [Recording() for _ in range(ranks)]
        hand_off = PartedHandOff(list(zip(parts_of(ranks), recorded, strict=True)))
        logits = prefill(LocalPrefill(folder, 1024, mesh=mesh), hand_off)
        torch.save([each.pushed for each in recorded], output / f"pushed-{rank}.pt")
        mesh.close()
    listener = Listener(str(output / f"channel-{rank}"), family="AF_UNIX") if rank else None
    # From here on all have pushed and listen.
    Mesh.join(max(prefilling, ranks), 1, rank, f"file://{output}/met").close()
    if rank >= ranks:
        return
    every = [torch.load(output / f"pushed-{r}.pt", weights_only=False) for r in range(prefilling)]
    pushed = [each for own in every for each in own[rank]]
    decode = Mesh.single()
    if ranks > 1:
        decode = Mesh.join(ranks, 1, rank, f"file://{output}/decode")
    if listener is None:
        addresses = [str(output / f"channel-{other}") for other in range(1, ranks)]
        torch.save(lead(decode, folder, addresses, pushed, logits), output / "tokens.pt")
    else:
        follow(decode, folder, listener, pushed)
    if ranks > 1:
        decode.close()


def lead(
    mesh: Mesh, folder: Path, addresses: Sequence[str], pushed: Pushed, logits: np.ndarray
) -> dict[int, list[int]]:
    model = Qwen2.load(folder, mesh, torch.float32, CPU)
    channels = [Client(address, family="AF_UNIX") for address in addresses]
    followers = Followers(channels)
    pool = LeadingPool(model.page_geometry, PAGES, CPU, followers)
    pool.memory.fill_(torch.nan)
    step = LeadingStep(make_step(model, pool, 4), followers)
    decoder = Decoder(model, pool, TokenBytes(build_tokenizer()), 4, step=step)
    decoder.reserve(make_request("a", PROMPT.tolist(), max_tokens=12, choices=2))
    for channel in channels:
        channel.send(decoder.block_table("a"))
    for place, values in pushed:
        decoder.receive("a", place, Pages(values))
    assert decoder.complete_tokens("a") == 768
    for channel in channels:
        assert channel.recv() == 768
    outputs = decoder.start("a", logits)
    while decoder.has_work:
        outputs += decoder.step()
    followers.close()
    assert all(isinstance(each, Delta) for _, each in outputs)
    return tokens_by_choice(outputs, "a")


def follow(mesh: Mesh, folder: Path, listener: Listener, pushed: Pushed) -> None:
    model = Qwen2.load(folder, mesh, torch.float32, CPU)
    pool = PagePool(model.page_geometry, PAGES, CPU)
    pool.memory.fill_(torch.nan)
    follower = Follower(pool, make_step(model, pool, 4))
    pages = FollowerPages(pool, model.heads.first_kv_head)
    channel = listener.accept()
    pages.expect("a", BlockTable.of(channel.recv()[:6]))
    for place, values in pushed:
        pages.receive("a", place, Pages(values))
    channel.send(pages.complete_tokens("a"))
    follower.follow(channel)


@pytest.mark.parametrize(
    ("mesh", "ranks"),
    [
        ((2, 1), 2), ((2, 2), 1), ((1, 3), 4), ((2, 2), 4),
        pytest.param((1, 2), 2, marks=pytest.mark.slow),
        pytest.param((2, 1), 1, marks=pytest.mark.slow),
    ],
    ids=str,
)  # fmt: skip
def test_any_mesh_hands_off_to_any_number_of_decode_ranks(
    mesh: tuple[int, int], ranks: int, folder: Path, tmp_path: Path
) -> None:
    local, alone = LocalPrefill(folder, 1024), Recording()
    logits = prefill(local, alone)
    expected = lead(Mesh.single(), folder, [], alone.pushed, logits)
    prefilling = math.prod(mesh)
    run_ranks(rank_main, (mesh, ranks, folder, tmp_path), max(prefilling, ranks))
    assert torch.load(tmp_path / "tokens.pt", weights_only=False) == expected
    for rank in range(prefilling):
        pushed = torch.load(tmp_path / f"pushed-{rank}.pt", weights_only=False)
        for kv_heads, (place, values) in (
            (part, each) for part, own in zip(parts_of(ranks), pushed, strict=True) for each in own
        ):
            assert place.first_kv_head in kv_heads
            assert place.first_kv_head + values.shape[1] <= kv_heads.stop


class _Senders(Sender):
    def __init__(self) -> None:
        self.opened: list[tuple[Destination, Recording]] = []

    def open(self, destination: Destination) -> HandOff:
        self.opened.append((destination, Recording()))
        return self.opened[-1][1]


def geometry_of(heads: int) -> PageGeometry:
    return PageGeometry(1, heads, 2, torch.float32)


def make_held(heads: int) -> HeldPages:
    pool = PagePool(geometry_of(heads), 6, CPU)
    pool.memory.copy_(torch.arange(pool.memory.numel()).view(pool.memory.shape))
    return pool.held(0, np.array([4, 1]))


def test_pages_are_cut_by_heads() -> None:
    senders = _Senders()
    parts = tuple(Part(each, Destination(str(each), 0)) for each in (range(2), range(2, 4)))
    hand_off = PartedSender(senders).open(PartedDestination("a", 128, parts))
    assert [each for each, _ in senders.opened] == [part.destination for part in parts]
    (_, first), (_, second) = senders.opened
    held = make_held(3)
    hand_off.push(Place(0, 7, 1), held)
    [(place, values)] = first.pushed
    assert place == Place(0, 7, 1)
    torch.testing.assert_close(values, held.read().values[:, :1])
    [(place, values)] = second.pushed
    assert place == Place(0, 7, 2)
    torch.testing.assert_close(values, held.read().values[:, 1:])
    hand_off.push(Place(0, 7, 3), make_held(1))
    assert len(first.pushed) == 1
    assert len(second.pushed) == 2
    assert hand_off.failure is None
    second.failed = "gone"
    assert hand_off.failure == "gone"
    hand_off.flush()
    hand_off.abandon()
    assert first.calls == second.calls == ["flush", "abandon"]


def test_a_destination_of_one_part_is_opened_as_it_is() -> None:
    senders = _Senders()
    destination = Destination("a", 0)
    assert PartedSender(senders).open(destination) is senders.opened[0][1]
    assert senders.opened[0][0] is destination


def test_heads_of_heads_are_those_of_the_pool() -> None:
    held = make_held(6).heads(1, 4).heads(2, 2)
    assert held.kv_heads == range(3, 5)
    torch.testing.assert_close(held.read().values, make_held(6).read().values[:, 3:5])


def test_what_lies_in_parts_comes_back_together(folder: Path) -> None:
    """A rank with all heads, or with some, fetches from whoever has them."""
    local = LocalPrefill(folder, 1024)
    geometry = local.pool.geometry
    table = BlockTable.of([5, 0, 3, 2, 7, 6])
    pages = []
    for kv_heads in parts_of(2):
        pool = PagePool(replace(geometry, num_kv_heads=len(kv_heads)), 8, CPU)
        pages.append(FollowerPages(pool, kv_heads.start))
        pages[-1].expect("a", table)
    hand_off = PartedHandOff(
        [
            (kv_heads, DirectHandOff(own, "a"))
            for kv_heads, own in zip(parts_of(2), pages, strict=True)
        ]
    )
    expected = prefill(local, hand_off)
    assert [own.complete_tokens("a") for own in pages] == [768, 768]
    another = LocalPrefill(folder, 1024)
    another.prefiller.admit("a", PROMPT)
    hand_off.fetch(another.prefiller.pages_to_fetch("a", 0, 512))
    result = another.prefiller.run_chunk("a", 512, len(PROMPT))
    assert result.logits is not None
    # The last chunk attends to the same keys and values, and nothing of it is cut otherwise.
    np.testing.assert_array_equal(result.logits.numpy(), expected)


def test_a_follower_takes_pages_of_its_own_heads_and_of_requests_that_it_expects() -> None:
    pool = PagePool(geometry_of(2), 8, CPU)
    pool.memory.zero_()
    pages = FollowerPages(pool, first_kv_head=2)
    whole = Pages(torch.ones(1, 2, 2, 128, 2))
    with pytest.raises(TransferError):
        pages.receive("a", Place(0, 0, 2), whole)
    pages.expect("a", BlockTable.of([3, 4]))
    assert (pages.first_kv_head, pages.num_expected) == (2, 1)
    pages.receive("a", Place(0, 1, 2), whole)
    assert pages.complete_tokens("a") == 0
    pages.receive("a", Place(0, 0, 3), Pages(torch.ones(1, 1, 2, 128, 2)))
    assert pages.complete_tokens("a") == 0
    pages.receive("a", Place(0, 0, 2), Pages(torch.ones(1, 1, 2, 128, 2)))
    assert pages.complete_tokens("a") == 256
    assert pool.memory.sum(dim=(0, 2, 3, 4, 5)).tolist() == [0, 0, 0, 1024, 1024, 0, 0, 0]
    for place, came in ((Place(0, 0, 1), whole), (Place(0, 0, 4), whole)):
        with pytest.raises(TransferError):
            pages.receive("a", place, came)
    with pytest.raises(RefusedPagesError):
        pages.receive("a", Place(0, 0, 3), whole)
    for place, count, heads in (
        (Place(0, 0, 1), 1, 1),
        (Place(0, 1, 2), 2, 1),
        (Place(0, 0, 3), 1, 2),
    ):
        with pytest.raises(TransferError):
            pages.held("a", place, count, heads)
    held = pages.held("a", Place(0, 1, 3), 1, 1)
    assert held.numbers.tolist() == [4]
    assert held.kv_heads == range(1, 2)
    pages.forget("a")
    pages.forget("a")
    with pytest.raises(TransferError):
        pages.complete_tokens("a")
