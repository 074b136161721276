"""Attention as the plugin computes it, by the definition and by the engine; vLLM is not needed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from longreach.engine.local import LocalPrefill
from tests.engine.checkpoints import DUAL_CHUNK, VOCAB, make_checkpoint, oracle_logits

from .steps import Engine, Request

ALIGNED = {"chunk_size": 384, "local_size": 128, "original_max_position_embeddings": 300}
"""A stride of 256: two whole pages."""


def random_tokens(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCAB, count).tolist()


def sparse_beyond(folder: Path, tokens: int) -> None:
    config = folder / "config.json"
    keys = f'"sparse_attention_threshold": {tokens}, "chunk_size"'
    config.write_text(config.read_text().replace('"chunk_size"', keys))


def assert_as_defined(folder: Path, requests: list[Request], logits: list[torch.Tensor]) -> None:
    for request, own in zip(requests, logits, strict=True):
        tokens = request.tokens[: request.done]
        expected = oracle_logits(folder, tokens, max(0, len(tokens) - request.prompt))
        # float32 through all layers, against float64.
        torch.testing.assert_close(own.double(), expected, rtol=2e-3, atol=2e-3)


def some_requests() -> list[Request]:
    return [
        Request(random_tokens(700, 1), prompt=700),
        Request(random_tokens(140, 2), prompt=130),
        Request(random_tokens(60, 3), prompt=60),
    ]


STEPS = (
    {1: 130, 0: 70},
    {1: 1, 0: 200, 2: 59},
    {1: 1, 2: 1, 0: 1},
    {1: 1, 0: 57},
    {1: 1, 0: 300},
    {1: 1, 0: 72},
)


@pytest.mark.parametrize("dual", [DUAL_CHUNK, ALIGNED])
def test_prompts_in_pieces_beside_decodes(tmp_path: Path, dual: dict[str, int]) -> None:
    """Beyond two dual chunks, from odd places to odd places; a short one decodes meanwhile."""
    folder, requests = make_checkpoint(tmp_path, dual), some_requests()
    assert_as_defined(folder, requests, Engine(folder, requests, 768).run(STEPS))


def test_decodes_by_the_kernel_over_inputs_that_stay(tmp_path: Path) -> None:
    """On a GPU natively, else in Triton's interpreter."""
    folder = make_checkpoint(tmp_path, ALIGNED)
    request = Request(random_tokens(640, 8), prompt=620)
    other = Request(random_tokens(640, 9), prompt=200)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    engine = Engine(folder, [request, other], 640, device, programs=3)
    together = [{0: 1, 1: 1}] * 8
    engine.run([{0: 620}, {1: 200}, *together[:4], {1: 1}, *together[4:]])
    assert_as_defined(
        folder, [request, other], [torch.cat(each.logits) for each in (request, other)]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_gpu_computes_the_same(tmp_path: Path) -> None:
    """In 16 bits, by the kernels that serve: within what rounding does."""
    folder = make_checkpoint(tmp_path, ALIGNED, hidden_size=256, head_dim=64)
    requests = some_requests()
    gpu = torch.device("cuda")
    found = Engine(folder, requests, 768, gpu, torch.bfloat16, programs=8).run(STEPS)
    for request, own in zip(requests, found, strict=True):
        tokens = request.tokens[: request.done]
        expected = oracle_logits(folder, tokens, max(0, len(tokens) - request.prompt))
        assert float((own.double() - expected).norm() / expected.norm()) < 0.06


def test_a_sequence_that_was_preempted_is_computed_again(tmp_path: Path) -> None:
    """Its prompt under the prompt's temperature, what it had generated under a longer one."""
    folder = make_checkpoint(tmp_path, ALIGNED)
    request = Request(random_tokens(420, 4), prompt=400)
    [logits] = Engine(folder, [request], 512).run([{0: 300}, {0: 120}])
    alone = Request(request.tokens, prompt=400)
    [one_by_one] = Engine(folder, [alone], 512).run([{0: 400}, *[{0: 1}] * 20])
    # Other pieces, so float32 sums are made in another order.
    torch.testing.assert_close(logits[:400], one_by_one[:400], rtol=1e-3, atol=1e-3)
    # Those that are computed together have the temperature of the last of them.
    torch.testing.assert_close(logits[400:], one_by_one[400:], rtol=5e-2, atol=5e-2)
    assert not torch.equal(logits[400:], one_by_one[400:])


def test_rows_that_fill_a_step_up_are_left_out(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, ALIGNED)
    requests = [Request(random_tokens(130, 5), prompt=129), Request([], prompt=0)]
    engine = Engine(folder, requests, 256)
    engine.step({0: 129})
    engine.step({0: 1, 1: 0})
    assert_as_defined(folder, requests[:1], [torch.cat(requests[0].logits)])


@pytest.mark.parametrize("chunk", [128, 384, 1024])
def test_long_prompts_attend_sparsely_as_the_engine_does(tmp_path: Path, chunk: int) -> None:
    """The engine's own prefill, chunk for chunk; its last rows in full."""
    folder = make_checkpoint(tmp_path, ALIGNED, sparse=(64, 128))
    sparse_beyond(folder, 500)
    tokens = random_tokens(1000, 6)
    expected = LocalPrefill(folder, 1024).logits(np.array(tokens, dtype=np.int32), chunk)
    request = Request(tokens, prompt=1000)
    engine = Engine(folder, [request], 1024)
    ends = [*range(chunk, 1000, chunk), 1000]
    [logits] = engine.run(
        [{0: min(chunk, end) if end % chunk == 0 else end % chunk} for end in ends]
    )
    # Both in float32, of the same selections: only matrices are multiplied in other shapes.
    torch.testing.assert_close(logits[-1], expected, rtol=1e-4, atol=1e-4)
    dense = oracle_logits(folder, tokens)[-1].float()
    assert not torch.allclose(logits[-1], dense, rtol=1e-2, atol=1e-2)


def test_pieces_of_a_sparse_prompt_may_begin_anywhere(tmp_path: Path) -> None:
    """With budgets for everything, sparse attention is attention; odd pieces included."""
    folder = make_checkpoint(tmp_path, ALIGNED, sparse=(4096, 4096))
    sparse_beyond(folder, 500)
    request = Request(random_tokens(900, 7), prompt=900)
    steps = [{0: count} for count in (200, 1, 30, 290, 79, 300)]
    assert_as_defined(folder, [request], Engine(folder, [request], 1024).run(steps))
