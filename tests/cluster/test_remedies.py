"""Which setting is named for what the engine says: once, and at every edge."""

import re
from typing import get_args
from unittest.mock import Mock

import numpy as np
import pytest
import ray
import torch
from ray.exceptions import RayTaskError

from longreach.cluster.cli import main as command_line
from longreach.cluster.messages import WorkerDestination
from longreach.cluster.remedies import remedied, remedy_of
from longreach.cluster.rest.errors import as_rest_error
from longreach.cluster.settings import Settings
from longreach.cluster.transports.object_store import ObjectStoreSender
from longreach.engine import errors
from longreach.engine.errors import FactualError, LongreachError, MemoryNeeds
from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import HeldPages, Pages

WIDE = MemoryNeeds("prefill", 2048, 10**9, 10**9, 10**9, 2 * 10**9, 1, quantized=False)
NARROW = MemoryNeeds("decode", 2048, 10**9, 10**9, 10**9, 2 * 10**9, 2, quantized=True, narrow=True)

STEPS = {"decode.kv_cache_tokens", "decode.max_batch", "decode.prefill_alone"}

REMEDIES: list[tuple[LongreachError, set[str]]] = [
    (
        errors.DoesNotFitError(WIDE, 1024),
        {
            "prefill.kv_cache_tokens", "model.kv_cache_dtype", "model.weights",
            "prefill.chunk_tokens", "prefill.tensor_parallel",
        },
    ),
    (
        errors.DoesNotFitError(WIDE, 0),
        {"model.weights", "prefill.chunk_tokens", "prefill.tensor_parallel"},
    ),
    (
        errors.LoadingOutOfMemoryError(NARROW),
        STEPS | {"decode.tensor_parallel"},
    ),
    (errors.StepDoesNotFitError(8), STEPS),
    (
        errors.ChunkOutOfMemoryError(0, 128),
        {"prefill.chunk_tokens", "prefill.kv_cache_tokens"},
    ),
    (errors.ReceiveOutOfMemoryError("a"), STEPS),
    (errors.StartOutOfMemoryError(2), STEPS),
    (errors.StepOutOfMemoryError(8), STEPS),
    (errors.CacheTooSmallError("prefill", 256, 128), {"prefill.kv_cache_tokens"}),
    (errors.CacheTooSmallError("decode", 256, 128), {"decode.kv_cache_tokens"}),
    (
        errors.TensorParallelError(3, 4, 2, 256, (1, 2, 4)),
        {"prefill.tensor_parallel", "prefill.sequence_parallel"},
    ),
    (errors.WeightFormatError("folder", "awq"), {"model.weights"}),
    (errors.NarrowComputeError("float16"), {"model.dtype"}),
    (errors.NoNarrowProductsError("an old GPU"), {"model.weights"}),
    (
        errors.DividedBlockError("down_proj", 64, 128),
        {"prefill.tensor_parallel", "prefill.sequence_parallel", "decode.tensor_parallel"},
    ),
    (errors.MixedPrecisionError("bfloat16", "float32"), {"model.dtype", "model.kv_cache_dtype"}),
    (errors.PageFormatError("bfloat16", "float32"), {"model.dtype", "model.kv_cache_dtype"}),
    (
        errors.RefusedPagesError("a", "layer 0", errors.PageFormatError("bfloat16", "float32")),
        {"model.dtype", "model.kv_cache_dtype"},
    ),
    (errors.OtherHostError("here", "there"), {"transport.kind"}),
    (errors.CannotSharePagesError("no"), {"transport.kind"}),
    (errors.CannotMapPagesError("no"), {"transport.kind"}),
    (errors.CannotReachPagesError("no"), {"transport.kind"}),
    (errors.NoNixlError(), {"transport.kind"}),
    (errors.NoVllmError("no"), {"decode.engine"}),
]  # fmt: skip
NO_REMEDY = (
    errors.OutOfPagesError(2, 1, 8),
    errors.QueueFullError(3),
    errors.PoisonousError(3),
    errors.LeftMeshError(),
    errors.CancelledElsewhereError(),
)

EVERY = pytest.mark.parametrize(
    ("error", "names"), REMEDIES, ids=[type(error).__name__ for error, _ in REMEDIES]
)
KEYS = {
    f"{name}.{key}"
    for name, section in Settings.model_fields.items()
    # Of a section that may come several times, the annotation is a tuple.
    for key in getattr(
        next(iter(get_args(section.annotation)), section.annotation), "model_fields", ()
    )
}


def names_in(text: str) -> set[str]:
    return set(re.findall(r"\b[a-z]+\.[a-z_]+\b", text))


@EVERY
def test_settings_are_named_as_they_are_written(error: LongreachError, names: set[str]) -> None:
    remedy = remedy_of(error)
    assert remedy is not None
    assert names_in(remedy) == names
    assert names <= KEYS
    assert names_in(error.sentence) == set()


def test_every_error_with_facts_is_here() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    here = {type(error) for error, _ in REMEDIES} | {type(error) for error in NO_REMEDY}
    ours = {kind for kind in below(FactualError) if kind.__module__ == errors.__name__}
    assert ours - here == {FactualError, errors.DecodeOutOfMemoryError}
    assert {remedy_of(error) for error in NO_REMEDY} == {None}


def test_who_shares_a_gpu_may_have_one_alone() -> None:
    error = errors.DoesNotFitError(WIDE, 1024)
    shared, alone = remedy_of(error, gpus=0.5), remedy_of(error, gpus=1)
    assert shared is not None
    assert alone is not None
    assert "prefill.gpus_per_rank" in shared
    assert "prefill.gpus_per_rank" not in alone


def test_a_remedy_is_said_once_and_the_first_one_stays() -> None:
    error = errors.ChunkOutOfMemoryError(0, 128)
    for _ in range(2):
        assert str(remedied(error)).count("prefill.chunk_tokens") == 1
    own = errors.ChunkOutOfMemoryError(0, 128).with_remedy("lower --chunk-tokens")
    assert str(remedied(own)) == f"{own.sentence}; lower --chunk-tokens"


@EVERY
def test_a_client_reads_which_setting_helps(error: LongreachError, names: set[str]) -> None:
    """Wrapped as it comes through two calls, and as it is."""
    wrapped = RayTaskError("step", "Traceback", error).as_instanceof_cause()
    for raised in (RayTaskError("generate", "Traceback", wrapped).as_instanceof_cause(), error):
        message = as_rest_error(raised).message
        assert all(message.count(name) == 1 for name in names), message


@EVERY
def test_the_command_line_says_which_setting_helps(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: LongreachError,
    names: set[str],
) -> None:
    monkeypatch.setattr(command_line, "app", Mock(side_effect=error))
    with pytest.raises(SystemExit) as ended:
        command_line.main()
    assert ended.value.code == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert names_in(said) >= names


@pytest.mark.parametrize(
    "error",
    [errors.PageFormatError("bfloat16", "float32"), errors.ReceiveOutOfMemoryError("a")],
    ids=lambda error: type(error).__name__,
)
def test_what_a_worker_says_of_pages_names_the_setting_in_the_ranks_words(
    monkeypatch: pytest.MonkeyPatch, error: LongreachError
) -> None:
    """Of a failure only its words go on from the rank to the client."""
    answer = Mock(side_effect=RayTaskError("receive", "Traceback", error).as_instanceof_cause())
    monkeypatch.setattr(ray, "put", Mock())
    monkeypatch.setattr(ray, "wait", lambda references, timeout: (references, []))
    monkeypatch.setattr(ray, "get", answer)
    sender = ObjectStoreSender(1 << 20).open(WorkerDestination("a", 0, Mock(), 0))
    layer = Pages(torch.zeros(1, 1, 2, 128, 4))
    sender.push(Place(0, 0, 0), HeldPages(layer, np.zeros(1, dtype=np.int64), slice(0, 1)))
    with pytest.raises(errors.TransferError) as raised:
        sender.flush()
    remedy = remedy_of(error)
    assert remedy is not None
    assert as_rest_error(raised.value).message.count(remedy) == 1
