"""The kernels' decode step (on a GPU, or in Triton's interpreter) against the portable one."""

import gc
import re
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from torch import Tensor

from longreach.engine.decode.decoder import Decoder
from longreach.engine.decode.detokenizer import TokenBytes
from longreach.engine.decode.graph_step import (
    Capture,
    GraphStep,
    captured,
    eager,
)
from longreach.engine.decode.launches import StepResults
from longreach.engine.decode.make_step import make_step
from longreach.engine.decode.portable_step import PortableStep
from longreach.engine.decode.sampler import Sampler
from longreach.engine.decode.step import (
    NO_PROMPTS,
    DecodeStep,
    Outcome,
    PromptLimits,
    PromptPiece,
    StepRow,
)
from longreach.engine.decode.step_rows import prompt_row_counts, row_counts, step_rows
from longreach.engine.errors import GenerationError, GrammarError, StepDoesNotFitError
from longreach.engine.kv.formats import KVCacheDtype
from longreach.engine.kv.pages import PagePool
from longreach.engine.messages import (
    ChosenToken,
    Delta,
    GenerationRequest,
    Progress,
    SamplingParameters,
)
from longreach.engine.model.config import WeightFormat
from longreach.engine.model.qwen2 import Qwen2
from longreach.engine.parallel.mesh import Mesh
from longreach.kernels import elementwise, greedy, matvec, narrow, quantized, sampling
from longreach.kernels.elementwise import reference as elementwise_reference
from longreach.kernels.elementwise import triton_elementwise
from longreach.kernels.greedy import triton_greedy
from longreach.kernels.matvec import triton_matvec
from longreach.kernels.narrow import reference as narrow_reference
from longreach.kernels.narrow import triton_narrow
from longreach.kernels.page_size import pages_for
from longreach.kernels.pages import BlockTable
from longreach.kernels.quantized import reference as quantized_reference
from longreach.kernels.quantized import triton_quantized
from longreach.kernels.sampling import triton_sampling
from longreach.lab.pocket.tokenizer import build_tokenizer

from ...kernels import conftest  # noqa: F401  # mends Triton's interpreter
from ...kernels.poison import poison_fresh_memory
from ..checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
POOL_PAGES = 24
MAX_BATCH = 5
PROGRAMS = 3
PROMPTS = PromptLimits(longest=512, at_once=192, pieces=3)
STRIDE = DUAL_CHUNK["chunk_size"] - DUAL_CHUNK["local_size"]

on_gpus = pytest.mark.skipif(DEVICE.type == "cpu", reason="graphs are captured on GPUs")


def elementwise_on(tensor: torch.Tensor) -> ModuleType:
    """The kernels; but on a machine with a GPU, what is on its CPU is computed as defined."""
    return triton_elementwise if tensor.device.type == DEVICE.type else elementwise_reference


@pytest.fixture(autouse=True)
def kernels_for_cpus_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the interpreter, all of the step's kernels instead of their definitions."""
    monkeypatch.setattr(elementwise, "_version", elementwise_on)
    monkeypatch.setattr(greedy, "best_tokens", triton_greedy.best_tokens)
    monkeypatch.setattr(matvec, "linear", triton_matvec.linear)


@pytest.fixture
def kernels_as_served(monkeypatch: pytest.MonkeyPatch, kernels_for_cpus_too: None) -> None:
    """For what is about who is in a step, and when: those that this device computes with.

    What they compute is held by the tests that compare steps; the interpreter takes its time.
    """
    monkeypatch.undo()


@pytest.fixture(scope="module", params=[DUAL_CHUNK, None], ids=["dual chunks", "plain"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    return make_checkpoint(folder, dual_chunk=request.param, layers=2)


@pytest.fixture(scope="module")
def dual_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dual"), dual_chunk=DUAL_CHUNK, layers=2)


@pytest.fixture(scope="module")
def shallow_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of one layer, for what is about the step and not about its layers."""
    return make_checkpoint(tmp_path_factory.mktemp("shallow"), dual_chunk=DUAL_CHUNK, layers=1)


def load(
    folder: Path,
    dtype: torch.dtype = torch.float32,
    weights: WeightFormat = "auto",
    device: torch.device = DEVICE,
) -> Qwen2:
    return Qwen2.load(folder, Mesh.single(), dtype, device, weights)


@dataclass
class Side:
    """A step and its pages."""

    pool: PagePool
    step: DecodeStep


def make_sides(
    model: Qwen2,
    counts: Sequence[int] = (1, 2, MAX_BATCH),
    kept: KVCacheDtype = "auto",
    prompts: PromptLimits = NO_PROMPTS,
    portable_model: Qwen2 | None = None,
) -> tuple[Side, Side]:
    """The portable step and the kernels', whose pools hold the same: random, behind it NaN.

    Args:
        portable_model: another than the kernels', perhaps on another device.
    """
    models = portable_model or model, model
    pools = [
        PagePool(model.page_geometry.kept_as(kept), POOL_PAGES, each.device) for each in models
    ]
    torch.manual_seed(0)
    fill_with_noise(pools[0])
    pools[1].memory.copy_(pools[0].memory)
    if pools[0].scales is not None and pools[1].scales is not None:
        pools[1].scales.copy_(pools[0].scales)
    portable = PortableStep(models[0], pools[0], MAX_BATCH)
    kernels = GraphStep(model, pools[1], counts, PROGRAMS, eager, prompts)
    return Side(pools[0], portable), Side(pools[1], kernels)


def fill_with_noise(pool: PagePool) -> None:
    noise = torch.randn(pool.memory.shape, device=pool.memory.device)
    if pool.scales is None:
        pool.memory.copy_(noise)
    else:
        pool.memory.copy_((noise * 64).clamp(-448, 448))
        pool.scales.fill_(2.0**-6)


def make_tables(lengths: Sequence[int], shared: int = 0) -> list[BlockTable]:
    """Shuffled pages; the first `shared` are the same in every table."""
    pages = np.random.default_rng(sum(lengths)).permutation(POOL_PAGES).tolist()
    common = [pages.pop() for _ in range(shared)]
    return [
        BlockTable.of([*common, *(pages.pop() for _ in range(pages_for(n + 1) - shared))])
        for n in lengths
    ]


def make_rows(lengths: Sequence[int], shared: int = 0, takes_best: bool = False) -> list[StepRow]:
    tables = make_tables(lengths, shared)
    return [
        StepRow((7 * index + length) % VOCAB, length, table, takes_best)
        for index, (length, table) in enumerate(zip(lengths, tables, strict=True))
    ]


def forget_what_lies_behind(pool: PagePool, rows: Sequence[StepRow]) -> None:
    """NaN wherever no token of these rows lies."""
    held = torch.zeros(POOL_PAGES, 128, dtype=torch.bool)
    for row in rows:
        positions = np.arange(row.length)
        held[row.table.pages[positions // 128], positions % 128] = True
    pool.memory.masked_fill_(~held.to(DEVICE)[None, :, None, None, :, None], torch.nan)


def check_same(
    portable: Side,
    kernels: Side,
    rows: Sequence[StepRow],
    tolerance: float,
    pieces: Sequence[PromptPiece] = (),
) -> None:
    expected, actual = portable.step.run(rows, pieces), kernels.step.run(rows, pieces)
    assert len(actual) == len(expected)
    for mine, theirs in zip(actual, expected, strict=True):
        check_outcome(mine, theirs, tolerance)
    written, reference = kernels.pool.memory.cpu(), portable.pool.memory.cpu()
    assert torch.equal(written.isnan(), reference.isnan())
    difference = (written - reference).nan_to_num().float().abs().max()
    assert difference <= tolerance * reference.nan_to_num().float().abs().max()


def check_outcome(mine: Outcome, theirs: Outcome, tolerance: float) -> None:
    assert isinstance(mine, ChosenToken) == isinstance(theirs, ChosenToken)
    if isinstance(mine, ChosenToken) and isinstance(theirs, ChosenToken):
        assert mine.token_id == theirs.token_id
        assert mine.logprob == pytest.approx(theirs.logprob, abs=50 * tolerance)
    elif isinstance(mine, np.ndarray) and isinstance(theirs, np.ndarray):
        assert mine.dtype == np.float32
        assert np.abs(mine - theirs).max() <= tolerance * np.abs(theirs).max()


@pytest.mark.parametrize(
    "lengths",
    [
        [0],  # nothing before it
        [300, 1, 127, 128],  # a page's last place, and a page's first
        [STRIDE - 1, STRIDE, 2 * STRIDE - 1, 2 * STRIDE, 2 * STRIDE + 1],  # dual chunks' borders
        [700, 5, 0],
    ],
    ids=str,
)
def test_logits_and_pages_are_those_of_the_portable_step(
    monkeypatch: pytest.MonkeyPatch, folder: Path, lengths: list[int]
) -> None:
    portable, kernels = make_sides(load(folder))
    rows = make_rows(lengths)
    for side in (portable, kernels):
        forget_what_lies_behind(side.pool, rows)
    poison_fresh_memory(monkeypatch)
    check_same(portable, kernels, rows, 1e-4)


@pytest.mark.parametrize("lengths", [[300, 128, 20], [129]], ids=str)
def test_in_bfloat16(dual_folder: Path, lengths: list[int]) -> None:
    portable, kernels = make_sides(load(dual_folder, torch.bfloat16))
    check_same(portable, kernels, make_rows(lengths), 0.04)


def test_a_batch_that_grows_over_page_borders_and_changes(shallow_folder: Path) -> None:
    """One object serves all steps: tables, plan and unused rows must follow."""
    portable, kernels = make_sides(load(shallow_folder))
    first, second, third = make_rows([126, 254, 40], takes_best=True)
    batches = [[first, second]] * 3 + [[second, third, first]] * 2 + [[third], [first]]
    lengths = {id(row.table): row.length for row in (first, second, third)}
    tables = {
        id(row.table): BlockTable.of([*row.table.pages, 20 + index])
        for index, row in enumerate((first, second, third))
    }
    for number, batch in enumerate(batches):
        rows = [
            StepRow(number + row.token, lengths[id(row.table)], tables[id(row.table)], True)
            for row in batch
        ]
        check_same(portable, kernels, rows, 1e-4)
        for row in batch:
            lengths[id(row.table)] += 1


def test_choices_that_share_pages(shallow_folder: Path) -> None:
    portable, kernels = make_sides(load(shallow_folder))
    check_same(portable, kernels, make_rows([270, 256, 300], shared=2), 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pages_of_8_bits_grow_over_page_borders(
    monkeypatch: pytest.MonkeyPatch, shallow_folder: Path, dtype: torch.dtype
) -> None:
    """Pages as they are defined on one side, the kernels' on the other; unused rows besides."""
    model = load(shallow_folder, dtype)
    portable, kernels = make_sides(model, kept="fp8_e4m3")
    lengths = [126, 254, 20]
    tables = [BlockTable.of(pages) for pages in ([3, 7], [0, 5, 9], [11])]
    for step in range(4):
        rows = [
            StepRow((7 * index + step) % VOCAB, length + step, table, False)
            for index, (length, table) in enumerate(zip(lengths, tables, strict=True))
        ]
        monkeypatch.setattr(quantized, "_version", lambda tensor: quantized_reference)
        expected = portable.step.run(rows)
        monkeypatch.setattr(quantized, "_version", lambda tensor: triton_quantized)
        actual = kernels.step.run(rows)
        for mine, theirs in zip(actual, expected, strict=True):
            check_outcome(mine, theirs, 1e-4 if dtype == torch.float32 else 0.04)
    written, reference = (widened(side.pool) for side in (kernels, portable))
    differing = (written != reference).sum()
    # Sums in another order may fall on another side of a border between two e4m3 values.
    assert differing <= (4 if dtype == torch.float32 else 0.2 * 12 * 2 * 2 * 16)
    torch.testing.assert_close(written, reference, rtol=0.14, atol=0.1)


@pytest.mark.parametrize("lengths", [[300, 128, 20], [129]], ids=str)
def test_weights_of_8_bits(
    monkeypatch: pytest.MonkeyPatch, dual_folder: Path, lengths: list[int]
) -> None:
    """As they are defined on one side, the kernels' on the other."""
    dtype = torch.float32 if DEVICE.type == "cpu" else torch.bfloat16
    portable, kernels = make_sides(load(dual_folder, dtype, "fp8"))
    rows = make_rows(lengths)
    monkeypatch.setattr(narrow, "_version", lambda tensor: narrow_reference)
    expected = portable.step.run(rows)
    monkeypatch.setattr(narrow, "_version", lambda tensor: triton_narrow)
    for mine, theirs in zip(kernels.step.run(rows), expected, strict=True):
        assert isinstance(mine, np.ndarray)
        assert isinstance(theirs, np.ndarray)
        # One number that falls on another side of a border between two e4m3 values moves others,
        # and in bfloat16 many do.
        tolerance = 0.03 if dtype == torch.float32 else 0.2
        assert np.linalg.norm(mine - theirs) <= tolerance * np.linalg.norm(theirs)


def widened(pool: PagePool) -> torch.Tensor:
    assert pool.scales is not None
    return pool.memory.float() * pool.scales[..., None, None]


def make_sides_with_prompts(
    folder: Path, dtype: torch.dtype = torch.float32, kept: KVCacheDtype = "auto"
) -> tuple[Side, Side]:
    """The portable side on a CPU, where PyTorch attends in every type."""
    on_cpu = load(folder, dtype, device=torch.device("cpu"))
    return make_sides(load(folder, dtype), kept=kept, prompts=PROMPTS, portable_model=on_cpu)


def make_pieces(
    bounds: Sequence[tuple[int, int, int]], first_page: int, takes_best: bool = False
) -> list[PromptPiece]:
    """Of prompts (start, end, length), whose pages are the last of the pool."""
    pieces, page = [], first_page
    for number, (start, end, length) in enumerate(bounds):
        prompt = np.random.default_rng(number).integers(0, VOCAB, length).astype(np.int32)
        table = BlockTable.of(range(page, page + pages_for(length)))
        page += len(table.pages)
        pieces.append(PromptPiece(prompt, start, end, table, takes_best))
    return pieces


PIECES = [
    [(0, 1, 1)],
    [(0, 17, 17), (128, 256, 300), (0, 40, 40)],
    [(256, 300, 300), (0, 5, 5), (384, 399, 399)],  # as many rows as there are
    [(128, 256, 500)],  # nothing ends
]


def test_pieces_of_prompts_beside_rows(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    poison_fresh_memory(monkeypatch)
    check_pieces_beside_rows(folder, [127, 250], PIECES[1])


@pytest.mark.parametrize(
    ("lengths", "bounds"), [([], PIECES[0]), ([], PIECES[2]), ([40], PIECES[3])], ids=str
)
def test_pieces_of_prompts_alone_and_such_as_end_nothing(
    monkeypatch: pytest.MonkeyPatch, shallow_folder: Path, bounds, lengths: list[int]
) -> None:
    poison_fresh_memory(monkeypatch)
    check_pieces_beside_rows(shallow_folder, lengths, bounds)


def check_pieces_beside_rows(
    folder: Path, lengths: list[int], bounds: list[tuple[int, int, int]]
) -> None:
    portable, kernels = make_sides_with_prompts(folder)
    rows = [
        StepRow((7 + length) % VOCAB, length, BlockTable.of([2 * n, 2 * n + 1]), False)
        for n, length in enumerate(lengths)
    ]
    check_same(portable, kernels, rows, 2e-4, make_pieces(bounds, first_page=8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pieces_of_prompts_in_pages_of_8_bits(
    monkeypatch: pytest.MonkeyPatch, shallow_folder: Path, dtype: torch.dtype
) -> None:
    portable, kernels = make_sides_with_prompts(shallow_folder, dtype, "fp8_e4m3")
    rows = [StepRow(3, 140, BlockTable.of([0, 1]), False)]
    pieces = make_pieces(PIECES[1], first_page=8)
    monkeypatch.setattr(quantized, "_version", lambda tensor: quantized_reference)
    expected = portable.step.run(rows, pieces)
    monkeypatch.setattr(quantized, "_version", lambda tensor: triton_quantized)
    actual = kernels.step.run(rows, pieces)
    assert len(actual) == 3
    for mine, theirs in zip(actual, expected, strict=True):
        check_outcome(mine, theirs, 2e-3 if dtype == torch.float32 else 0.06)
    # As above: a value may be the next one of e4m3, which is an eighth away.
    written, reference = (widened(side.pool)[:, 8:].cpu() for side in (kernels, portable))
    torch.testing.assert_close(written, reference, rtol=0.14, atol=0.1)


def test_steps_with_and_without_prompts_follow_each_other(shallow_folder: Path) -> None:
    """Unused rows, plans and wanted rows of an earlier step must not stay."""
    portable, kernels = make_sides_with_prompts(shallow_folder)
    rows = [StepRow(3, 140, BlockTable.of([0, 1]), False)]
    for bounds in (PIECES[2], [], PIECES[0], PIECES[3]):
        check_same(portable, kernels, rows, 2e-4, make_pieces(bounds, 8, takes_best=True))
    check_same(portable, kernels, [], 2e-4, make_pieces(PIECES[0], 8))


@pytest.mark.parametrize(
    ("at_once", "counts"),
    [
        (128, [64, 128]),
        (384, [64, 128, 192, 256, 384]),
        (192, [64, 128, 192]),
        (1024, [64, 128, 192, 256, 384, 512, 768, 1024]),
    ],
)
def test_graphs_for_prompts_end_with_what_is_computed_at_once(
    at_once: int, counts: list[int]
) -> None:
    assert prompt_row_counts(at_once) == counts


def test_the_largest_steps_have_no_sequences_beside_the_prompt() -> None:
    prompts = PromptLimits(longest=512, at_once=64, pieces=2, alone=300)
    assert step_rows([1, 3], prompts) == [(1, 0), (3, 0), (0, 64), (3, 64), (0, 128), (0, 256)]


def test_rows_get_what_they_ask_for(shallow_folder: Path) -> None:
    portable, kernels = make_sides(load(shallow_folder))
    best, full = make_rows([30, 31], takes_best=True), make_rows([30, 31])
    [chosen, logits] = kernels.step.run([best[0], full[1]])
    assert isinstance(chosen, ChosenToken)
    assert isinstance(logits, np.ndarray)
    check_same(portable, kernels, [best[0], full[1]], 1e-4)


def test_one_row_alone_is_multiplied_as_one_row(
    monkeypatch: pytest.MonkeyPatch, dual_folder: Path
) -> None:
    calls: list[int] = []

    def spy(x: torch.Tensor, *others: Any) -> torch.Tensor:
        calls.append(len(x))
        return triton_matvec.linear(x, *others)

    monkeypatch.setattr(matvec, "linear", spy)
    model = load(dual_folder)
    _, kernels = make_sides(model, counts=(1, 2))
    calls.clear()
    kernels.step.run(make_rows([30, 31]))
    assert calls == []
    kernels.step.run(make_rows([30]))
    assert calls == [1] * (4 * len(model.layers) + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("lengths", [[30], [300, 31, 129]], ids=str)
def test_what_is_no_token_cannot_come(
    shallow_folder: Path, lengths: list[int], dtype: torch.dtype
) -> None:
    """One row, whose products are others, and several; of tokens fewer than the best row's id."""
    model = load(shallow_folder, dtype)
    best, full = make_rows(lengths, takes_best=True), make_rows(lengths)
    for side, limited in zip(make_sides(model), make_sides(model.with_tokens(1)), strict=True):
        ids = [each.token_id for each in side.step.run(best) if isinstance(each, ChosenToken)]
        outcomes = limited.step.run(best)
        assert max(ids) > 0
        assert outcomes == [ChosenToken(0, 0.0)] * len(lengths)
    for side, limited in zip(make_sides(model), make_sides(model.with_tokens(50)), strict=True):
        every = [each.copy() for each in side.step.run(full) if isinstance(each, np.ndarray)]
        chosen = limited.step.run(best)
        for logits, outcome, token in zip(every, limited.step.run(full), chosen, strict=True):
            assert isinstance(outcome, np.ndarray)
            assert isinstance(token, ChosenToken)
            assert (outcome[:50] == logits[:50]).all()
            assert (outcome[50:] == -np.inf).all()
            logprobs = torch.from_numpy(logits[:50]).log_softmax(0)
            assert token.token_id == int(logprobs.argmax())
            assert token.logprob == pytest.approx(float(logprobs.max()), abs=1e-5)


def make_request(name: str, length: int, **sampling: Any) -> GenerationRequest:
    values = {"max_tokens": 6, "temperature": 0.0, "ignore_eos": True, **sampling}
    prompt = np.zeros(length, dtype=np.int32)
    return GenerationRequest(name, prompt, SamplingParameters(**values), 0.0)


class Engine:
    """A decoder whose prompts are not prefilled: pages hold what they happen to."""

    def __init__(
        self,
        model: Qwen2,
        capture: Capture,
        max_batch: int = 3,
        kept: KVCacheDtype = "auto",
        prompts: PromptLimits = NO_PROMPTS,
    ) -> None:
        self.pool = PagePool(model.page_geometry.kept_as(kept), POOL_PAGES, DEVICE)
        torch.manual_seed(1)
        fill_with_noise(self.pool)
        step = GraphStep(model, self.pool, row_counts(max_batch), PROGRAMS, capture, prompts)
        self.decoder = Decoder(
            model, self.pool, TokenBytes(build_tokenizer()), max_batch, prompts, step=step
        )

    def start(self, name: str, length: int, **sampling: Any) -> list[Any]:
        request = make_request(name, length, **sampling)
        self.decoder.reserve(request)
        logits = np.linspace(0, 1, VOCAB, dtype=np.float32)
        return self.decoder.start(name, logits, self.decoder.prepare(request))


def joining_and_leaving(engine: Engine) -> dict[tuple[str, int], list[int]]:
    """Requests of all kinds that come and go; the tokens of each choice."""
    decoder = engine.decoder
    outputs = engine.start("long", 380, max_tokens=9)
    outputs += engine.start("two", 127, choices=2, max_tokens=3, temperature=1.0, seed=3)
    outputs += decoder.step()
    outputs += engine.start("waits", 20, max_tokens=4)
    outputs += engine.start("leaves", 254, max_tokens=9)
    for _ in range(4):
        outputs += decoder.step()
    decoder.cancel("leaves")
    for name, length, choices in (("computed", 300, 1), ("short", 9, 2)):
        decoder.admit(make_request(name, length, max_tokens=5, choices=choices))
    while decoder.has_work:
        outputs += decoder.step()
    assert decoder.usage == 0
    tokens: dict[tuple[str, int], list[int]] = {}
    for name, delta in outputs:
        if isinstance(delta, Progress):
            continue
        assert isinstance(delta, Delta)
        tokens.setdefault((name, delta.choice), []).extend(t.token_id for t in delta.tokens)
    return tokens


SAMPLED: list[dict[str, Any]] = [
    {"temperature": 0.9, "top_p": 0.8, "seed": 5},
    {"temperature": 1.2, "top_k": 12, "presence_penalty": 0.6, "seed": 6},
    {"temperature": 0.0, "frequency_penalty": 1.5, "repetition_penalty": 1.3},
    {"temperature": 1.0, "min_p": 0.05, "logit_bias": ((7, 3.0), (9, -2.0)), "seed": 8},
]
HELD: list[dict[str, Any]] = [
    {"grammar": "start: /[0-9A-F]{12}/"},
    {"grammar": "start: /([0-4][5-9]){20}/", "temperature": 1.3, "presence_penalty": 0.5,
     "seed": 4},
]  # fmt: skip
SAMPLED_TOKENS = {f"{n}": n + 7 if DEVICE.type == "cuda" else 4 + n // 2 for n in range(7)}
"""Of each sampled request; fewer in the interpreter, where each takes its time."""


def sampled_tokens(engine: Engine) -> dict[str, list[int]]:
    """Sampled requests on three places, greedy and held ones among them: rows change hands."""
    outputs: list[Any] = []
    for number, asked in enumerate([*SAMPLED, SAMPLED[1], *HELD]):
        most = SAMPLED_TOKENS[f"{number}"]
        outputs += engine.start(f"{number}", 40 + 100 * number, max_tokens=most, **asked)
    outputs += engine.start("greedy", 12, max_tokens=4)
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    tokens: dict[str, list[int]] = {}
    for name, delta in outputs:
        assert isinstance(delta, Delta)
        assert all(np.isfinite(token.logprob) for token in delta.tokens)
        tokens.setdefault(name, []).extend(token.token_id for token in delta.tokens)
    return tokens


@pytest.mark.usefixtures("kernels_as_served")
def test_what_is_drawn_behind_the_step_is_what_the_host_draws(
    monkeypatch: pytest.MonkeyPatch, shallow_folder: Path
) -> None:
    """By the kernels; on a CPU as it is defined, too."""
    model = load(shallow_folder)
    with monkeypatch.context() as on_host:  # by the logits of the same step
        on_host.setattr(Sampler, "drawing", None)
        theirs = sampled_tokens(Engine(model, eager))
    assert {name: len(each) for name, each in theirs.items()} == {**SAMPLED_TOKENS, "greedy": 4}
    assert theirs["1"] != theirs["4"][: len(theirs["1"])]
    assert re.fullmatch("[0-9A-F]+", bytes(theirs["5"]).decode())
    assert re.fullmatch("([0-4][5-9])+[0-4]", bytes(theirs["6"]).decode())
    drawn_by = [triton_sampling.sample] + [sampling.sample] * (DEVICE.type == "cpu")
    for sample in drawn_by:
        monkeypatch.setattr(sampling, "sample", sample)
        assert sampled_tokens(Engine(model, eager)) == theirs


@pytest.mark.usefixtures("kernels_as_served")
def test_a_grammar_that_gives_out_ends_one_answer_alone_on_kernels(
    shallow_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its mask is wanted in the middle of a step of others."""
    engine = Engine(load(shallow_folder), eager)
    outputs = engine.start("good", 40, grammar="start: /[0-9]{9}/", temperature=1.0, seed=1)
    # Each step of this expression is a state more, of which there may be none here.
    monkeypatch.setattr("longreach.engine.decode.grammar._MOST_LEXER_STATES", 4)
    outputs += engine.start("ends", 40, grammar="start: /(A|B){30}/", max_tokens=40)
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    last = dict(outputs)
    assert isinstance(last["ends"], GrammarError)
    assert isinstance(last["good"], Delta)
    said = [output for name, output in outputs if name == "good"]
    assert re.fullmatch("[0-9]{6}", "".join(each.text for each in said))
    assert engine.decoder.usage == 0


def test_what_was_captured_stays_as_long_as_it_is_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph knows addresses alone: memory that is let go of would be somebody else's."""
    for name in ("Stream", "CUDAGraph", "stream", "current_stream", "graph", "graph_pool_handle"):
        monkeypatch.setattr(torch.cuda, name, MagicMock())
    launches = _Launched(torch.zeros(3))
    memory = weakref.ref(launches.newest)
    replay = captured(torch.device("cuda"))(launches)
    del launches
    gc.collect()
    assert memory() is not None
    assert replay().tokens.tolist() == [1, 1, 1]


@dataclass
class _Launched:
    newest: Tensor

    def __call__(self) -> StepResults:
        tokens = self.newest + 1
        return StepResults(tokens, tokens, tokens)


@on_gpus
def test_captured_draws_are_those_of_launched_ones(dual_folder: Path) -> None:
    model = load(dual_folder, torch.bfloat16)
    launched = sampled_tokens(Engine(model, eager))
    assert sampled_tokens(Engine(model, captured(DEVICE))) == launched


@pytest.mark.usefixtures("kernels_as_served")
def test_steps_that_run_ahead_say_what_those_do_that_are_waited_for(
    monkeypatch: pytest.MonkeyPatch, shallow_folder: Path
) -> None:
    """Tokens that the host does not know are taken where the step before left them.

    And what was started is finished.
    """
    model = load(shallow_folder)
    ahead = joining_and_leaving(Engine(model, eager, prompts=PROMPTS))
    assert {name: len(each) for name, each in ahead.items() if name[0] != "leaves"} == {
        ("long", 0): 9, ("two", 0): 3, ("two", 1): 3, ("waits", 0): 4,
        ("computed", 0): 5, ("short", 0): 5, ("short", 1): 5,
    }  # fmt: skip
    monkeypatch.setattr(GraphStep, "runs_ahead", False)
    waiting = joining_and_leaving(Engine(model, eager, prompts=PROMPTS))
    left = [said.pop(("leaves", 0)) for said in (ahead, waiting)]
    assert left[0] == left[1][: len(left[0])]
    assert ahead == waiting


@pytest.mark.filterwarnings("ignore:All-NaN slice", "ignore:invalid value")  # in the interpreter
def test_one_damaged_request_fails_alone_on_kernels(shallow_folder: Path) -> None:
    engine = Engine(load(shallow_folder), eager)
    engine.start("good", 40)
    engine.start("bad", 300)
    table = engine.decoder._reservations["bad"].block_tables[0]
    engine.pool.memory[:, int(table.pages[0])] = torch.nan
    outputs = engine.decoder.step() + engine.decoder.step()
    [(name, error)] = [each for each in outputs if isinstance(each[1], GenerationError)]
    assert name == "bad"
    assert "not finite" in str(error)
    while engine.decoder.has_work:
        outputs += engine.decoder.step()
    assert sum(name == "good" for name, _ in outputs) == 5
    assert engine.decoder.usage == 0


def test_too_little_memory_to_prepare_steps_is_said_with_the_largest(dual_folder: Path) -> None:
    def without_memory(launch: object) -> Any:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(StepDoesNotFitError) as refused:
        Engine(load(dual_folder), without_memory)
    assert refused.value.sequences == 3


@pytest.mark.parametrize(
    ("max_batch", "counts"), [(1, [1]), (2, [1, 2]), (6, [1, 2, 4, 6]), (8, [1, 2, 4, 8])]
)
def test_graphs_end_with_the_largest_batch(max_batch: int, counts: list[int]) -> None:
    assert row_counts(max_batch) == counts


def test_the_step_is_what_the_device_needs(dual_folder: Path) -> None:
    model = load(dual_folder)
    step = make_step(model, PagePool(model.page_geometry, 4, DEVICE), max_batch=2)
    assert isinstance(step, GraphStep if DEVICE.type == "cuda" else PortableStep)


@on_gpus
def test_a_captured_step_takes_no_memory_and_so_cannot_lack_it(dual_folder: Path) -> None:
    """Else it might fail while its inputs are still on their way, and the next overwrite them."""
    model = load(dual_folder, torch.bfloat16)
    pool = PagePool(model.page_geometry, POOL_PAGES, DEVICE)
    pool.memory.normal_()
    step = GraphStep(model, pool, row_counts(2), PROGRAMS, captured(DEVICE), PROMPTS)
    rows = [*make_rows([30], takes_best=True), *make_rows([31])]
    pieces = make_pieces(PIECES[1], first_page=8)
    step.run(rows, pieces)
    before = torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"]
    step.run(rows, pieces)
    assert torch.cuda.memory_stats(DEVICE)["allocation.all.allocated"] == before


@on_gpus
@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_captured_steps_with_weights_of_8_bits(dual_folder: Path, weights: WeightFormat) -> None:
    model = load(dual_folder, torch.bfloat16, weights)
    launched = joining_and_leaving(Engine(model, eager, prompts=PROMPTS))
    assert joining_and_leaving(Engine(model, captured(DEVICE), prompts=PROMPTS)) == launched


@on_gpus
@pytest.mark.parametrize("kept", ["auto", "fp8_e4m3"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_captured_steps_choose_what_launched_ones_do(
    dual_folder: Path, dtype: torch.dtype, kept: KVCacheDtype
) -> None:
    model = load(dual_folder, dtype)
    launched = joining_and_leaving(Engine(model, eager, kept=kept, prompts=PROMPTS))
    assert (
        joining_and_leaving(Engine(model, captured(DEVICE), kept=kept, prompts=PROMPTS)) == launched
    )
