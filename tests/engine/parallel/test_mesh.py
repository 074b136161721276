"""Every mesh gives what one process gives, and hands every page off exactly once."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.engine.errors import (
    ConfigurationError,
    InvalidRequestError,
    TensorParallelError,
)
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.hand_off import HandOff, Place
from longreach.engine.kv.pages import HeldPages, Pages
from longreach.engine.local import LocalPrefill
from longreach.engine.model.config import ModelConfig
from longreach.engine.model.files import ModelFiles
from longreach.engine.model.heads import RankHeads
from longreach.engine.model.load import load_model
from longreach.engine.parallel.mesh import Mesh
from longreach.engine.prefill.prefiller import Prefiller
from longreach.engine.prefill.sparsity import SparsityConfig

from ...processes import run_ranks
from ..checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint

LENGTHS = (1, 128, 700, 1000)
CHUNKS = (256, 640)
PUBLISHED = {**DUAL_CHUNK, "sparse_attention_threshold": 800}


@dataclass
class RecordingSender(HandOff):
    """Keeps the numbers it is given, and brings back those that it has, of all layers and heads."""

    pushed: list[tuple[int, int, int, Tensor]] = field(default_factory=list)
    has: Tensor | None = None

    def push(self, place: Place, pages: HeldPages) -> None:
        read = pages.read()
        wide = read.values.float()
        if read.scales is not None:
            wide *= read.scales[..., None, None]
        self.pushed.append((*astuple(place), wide.clone()))

    def fetch(self, wanted: Sequence[tuple[Place, HeldPages]]) -> None:
        assert self.has is not None
        for place, pages in wanted:
            first, head = place.first_page, place.first_kv_head
            heads = slice(head, head + pages.layer.values.shape[1])
            pages.write(Pages(self.has[place.layer, first : first + len(pages), heads]))

    def flush(self) -> None:
        pass

    def abandon(self) -> None:
        self.pushed.clear()


def run(local: LocalPrefill, length: int, chunk: int) -> tuple[Tensor, list]:
    prompt = np.random.default_rng(length).integers(0, VOCAB, length).astype(np.int32)
    sender = RecordingSender()
    local.pool.memory.fill_(torch.nan)
    if local.pool.scales is not None:
        local.pool.scales.fill_(torch.nan)
    local.prefiller.admit("request", prompt)
    logits = None
    for start in range(0, length, chunk):
        end = min(start + chunk, length)
        logits = local.prefiller.run_chunk("request", start, end, sender).logits
    local.prefiller.release("request")
    assert logits is not None
    return logits, sender.pushed


def run_all(local: LocalPrefill) -> dict[tuple[int, int], tuple[Tensor, list]]:
    return {(n, chunk): run(local, n, chunk) for n in LENGTHS for chunk in CHUNKS}


def rank_main(
    rank: int,
    meshes: list[tuple[int, int]],
    checkpoint: Path,
    output: Path,
    kept: KVCacheDtype,
) -> None:
    torch.set_num_threads(1)
    for tensor, sequence in meshes:
        place = f"{tensor}x{sequence}"
        mesh = Mesh.join(tensor, sequence, rank, f"file://{output}/meeting-{place}")
        local = LocalPrefill(checkpoint, 1024, mesh=mesh, kv_cache_dtype=kept)
        torch.save(run_all(local), output / f"{place}-{rank}.pt")
        mesh.close()


def windows_main(rank: int, ranks: int, checkpoint: Path, output: Path) -> None:
    torch.set_num_threads(1)
    mesh = Mesh.join(1, ranks, rank, f"file://{output}/meeting")
    torch.save(run_windows(checkpoint, mesh), output / f"{rank}.pt")
    mesh.close()


def run_windows(checkpoint: Path, mesh: Mesh) -> list[Tensor]:
    """Logits for several sizes of chunks, whose rows select in windows of 256."""
    local = LocalPrefill(checkpoint, 1024, mesh=mesh)
    sparsity = SparsityConfig.from_folder(checkpoint)
    assert sparsity is not None
    sparsity = replace(sparsity, window_tokens=256, last_queries=48)
    local.prefiller = Prefiller(local.model, local.pool, sparsity)
    return [run(local, length, chunk)[0] for length in (1000, 1024) for chunk in (256, 512, 1024)]


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_what_is_computed_at_once_changes_no_selection(
    ranks: int, checkpoint: Path, tmp_path: Path
) -> None:
    """Windows of selection lie where they do for every size of chunks, on every mesh."""
    expected = run_windows(checkpoint, Mesh.single())
    every = [expected]
    if ranks > 1:
        run_ranks(windows_main, (ranks, checkpoint, tmp_path), ranks)
        every = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for found in every:
        for number, logits in enumerate(found):
            whole = expected[number // 3 * 3]
            # Ranks add up in another order, in float32, through all layers.
            torch.testing.assert_close(logits, whole, rtol=3e-4, atol=3e-4)


def test_a_window_of_the_whole_chunk_selects_otherwise(checkpoint: Path) -> None:
    """So the test above compares something."""
    local = LocalPrefill(checkpoint, 1024)
    one, two = (run(local, 1024, chunk)[0] for chunk in (256, 1024))
    assert not torch.allclose(one, two, rtol=1e-2, atol=1e-2)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"), PUBLISHED, sparse=(60, 128))


@pytest.mark.parametrize(
    ("meshes", "kept"),
    [
        ([(1, 2), (2, 1)], "auto"),
        ([(1, 3)], "auto"),
        ([(1, 5)], "auto"),
        ([(2, 2), (4, 1)], "auto"),
        ([(1, 2)], "fp8_e4m3"),
    ],
)
def test_every_mesh_is_one_process(
    meshes: list[tuple[int, int]], kept: KVCacheDtype, checkpoint: Path, tmp_path: Path
) -> None:
    expected = run_all(LocalPrefill(checkpoint, 1024, kv_cache_dtype=kept))
    ranks = meshes[0][0] * meshes[0][1]
    run_ranks(rank_main, (meshes, checkpoint, tmp_path, kept), ranks)
    for tensor, sequence in meshes:
        results = [torch.load(tmp_path / f"{tensor}x{sequence}-{rank}.pt") for rank in range(ranks)]
        for key, (logits, pushed) in expected.items():
            for result in results:
                torch.testing.assert_close(result[key][0], logits, rtol=3e-4, atol=3e-4)
            together = [piece for result in results for piece in result[key][1]]
            target, whole = assembled(together, key[0]), assembled(pushed, key[0])
            if kept == "fp8_e4m3":
                # Sums in another order may fall on another side of a border between two values.
                assert (target != whole).double().mean() < 1e-4
                torch.testing.assert_close(target, whole, rtol=1 / 7, atol=0)
            else:
                torch.testing.assert_close(target, whole, rtol=1e-3, atol=1e-3)


def assembled(pieces: list, length: int) -> Tensor:
    """Keys and values of all layers from pages of which each head came once."""
    whole = torch.full((3, -(-length // 128), 2, 2, 128, 16), torch.nan)
    for layer, first_page, first_head, pages in pieces:
        heads = slice(first_head, first_head + pages.shape[1])
        place = whole[layer, first_page : first_page + len(pages), heads]
        assert place.isnan().all(), "a page came twice"
        place.copy_(pages)
    return whole


def going_on_main(
    rank: int, mesh: tuple[int, int], checkpoint: Path, source: Tensor, output: Path
) -> None:
    torch.set_num_threads(1)
    joined = Mesh.join(*mesh, rank, f"file://{output}/meeting")
    local = LocalPrefill(checkpoint, 1024, mesh=joined)
    torch.save((run_fetched(local, source), run_moved(local)), output / f"{rank}.pt")
    joined.close()


def run_fetched(local: LocalPrefill, source: Tensor) -> Tensor:
    """Logits of a prompt whose first two chunks are fetched."""
    prompt = np.random.default_rng(1000).integers(0, VOCAB, 1000).astype(np.int32)
    local.pool.memory.fill_(torch.nan)
    local.prefiller.admit("fetched", prompt)
    sender = RecordingSender(has=source)
    for start in (0, 256):
        sender.fetch(local.prefiller.pages_to_fetch("fetched", start, start + 256))
    return rest_of("fetched", local, sender, start=512)


def run_moved(local: LocalPrefill) -> tuple[Tensor, list]:
    """Logits of a prompt that goes on elsewhere, a chunk back, and what comes there."""
    prompt = np.random.default_rng(1000).integers(0, VOCAB, 1000).astype(np.int32)
    local.pool.memory.fill_(torch.nan)
    local.prefiller.admit("before", prompt)
    for start in (0, 256, 512):
        local.prefiller.run_chunk("before", start, start + 256, RecordingSender())
    sender = RecordingSender()
    local.prefiller.rename("before", "after", 512)
    local.prefiller.push("after", 0, 384, sender)
    local.prefiller.push("after", 384, 512, sender)
    return rest_of("after", local, sender, start=512), sender.pushed


def rest_of(name: str, local: LocalPrefill, sender: HandOff, start: int) -> Tensor:
    for first in range(start, 1000, 256):
        result = local.prefiller.run_chunk(name, first, min(first + 256, 1000), sender)
        if result.logits is not None:
            local.prefiller.release(name)
            return result.logits
    raise AssertionError


@pytest.mark.parametrize("mesh", [(1, 1), (1, 3), (2, 2)])
def test_a_prompt_goes_on_behind_pages_that_are_fetched_or_were_left(
    mesh: tuple[int, int], checkpoint: Path, tmp_path: Path
) -> None:
    """Each rank fetches its own heads, and all of their pages; and each pushes its part of them."""
    expected, pushed = run(LocalPrefill(checkpoint, 1024), 1000, 256)
    source = assembled(pushed, 1000)
    ranks = mesh[0] * mesh[1]
    if ranks == 1:
        local = LocalPrefill(checkpoint, 1024)
        results = [(run_fetched(local, source), run_moved(local))]
    else:
        run_ranks(going_on_main, (mesh, checkpoint, source, tmp_path), ranks)
        results = [torch.load(tmp_path / f"{rank}.pt") for rank in range(ranks)]
    for fetched, (moved, _) in results:
        # As above: ranks add up in another order, in float32, through all layers.
        torch.testing.assert_close(fetched, expected, rtol=3e-4, atol=3e-4)
        torch.testing.assert_close(moved, expected, rtol=3e-4, atol=3e-4)
    together = assembled([piece for _, (_, pieces) in results for piece in pieces], 1000)
    # K and V of the ranks' sums, where the others are of one process's.
    torch.testing.assert_close(together, source, rtol=1e-3, atol=1e-3)


def test_a_prompt_goes_on_only_where_it_has_been(checkpoint: Path) -> None:
    local = LocalPrefill(checkpoint, 1024)
    prompt = np.zeros(500, dtype=np.int32)
    local.prefiller.admit("a", prompt)
    local.prefiller.admit("b", prompt)
    local.prefiller.run_chunk("a", 0, 256)
    for name, to, done in (("c", "d", 0), ("a", "b", 0), ("a", "d", 384)):
        with pytest.raises(InvalidRequestError):
            local.prefiller.rename(name, to, done)
    local.prefiller.rename("a", "d", 256)
    with pytest.raises(InvalidRequestError):
        RecordingSender().fetch(local.prefiller.pages_to_fetch("d", 384, 500))


def config_with(heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(97, 64, 96, 3, heads, kv_heads, 16, 1e-6, 1e4, True, 4096, None, ())


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor_parallel", "expected"),
    [
        (28, 4, 2, [(0, 14, 0, 2, True), (14, 28, 2, 4, True)]),
        (
            4,
            2,
            4,
            [(0, 1, 0, 1, True), (1, 2, 0, 1, False), (2, 3, 1, 2, True), (3, 4, 1, 2, False)],
        ),
    ],
)
def test_heads_are_shared(heads, kv_heads, tensor_parallel, expected) -> None:
    config = config_with(heads, kv_heads)
    shares = [RankHeads.of(config, tensor_parallel, rank) for rank in range(tensor_parallel)]
    assert shares == [RankHeads(*share) for share in expected]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tensor_parallel"), [(28, 4, 8), (12, 4, 6), (6, 2, 5)]
)
def test_a_mesh_that_does_not_divide_is_refused(heads, kv_heads, tensor_parallel) -> None:
    config = config_with(heads, kv_heads)
    with pytest.raises(TensorParallelError) as refused:
        RankHeads.of(config, tensor_parallel, 0)
    assert refused.value.ranks == tensor_parallel
    assert (refused.value.num_heads, refused.value.num_kv_heads) == (heads, kv_heads)
    assert refused.value.possible[:2] == (1, 2)
    for ranks in refused.value.possible:
        RankHeads.of(config, ranks, 0)


@pytest.mark.parametrize("random", [True, False])
def test_a_mesh_that_does_not_divide_is_refused_before_weights_are_read(
    checkpoint: Path, random: bool
) -> None:
    """The folder of a partial download has no weights: the mesh is what is named."""
    (checkpoint / "model.safetensors").rename(checkpoint / "elsewhere")
    try:
        with pytest.raises(TensorParallelError) as refused:
            load_model(
                ModelFiles(checkpoint, checkpoint, random), Mesh(3, 1, 0), torch.float32,
                torch.device("cpu"),
            )  # fmt: skip
        assert (refused.value.ranks, refused.value.possible) == (3, (1, 2, 4))
    finally:
        (checkpoint / "elsewhere").rename(checkpoint / "model.safetensors")


def test_a_rank_outside_the_mesh_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"rank 2 .* 2 × 1"):
        Mesh.join(2, 1, 2, "tcp://127.0.0.1:1")
