"""The engine over vLLM itself, in this process, on a CPU: `make test-vllm`.

What a cluster does not do on purpose: leaving at each moment of a request.
"""

import time
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import pytest
import torch

from longreach.engine.kv.hand_off import Place
from longreach.engine.kv.pages import Pages
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters
from longreach.kernels.page_size import PAGE_TOKENS, pages_for
from longreach.plugins.vllm_decode.decoder import VllmDecoder

from .conftest import PAGES

if TYPE_CHECKING:
    from longreach.plugins.vllm_decode.vllm_core import VllmCore

pytestmark = pytest.mark.live

TOKENS = 300
NO_LOGITS = np.zeros(1, dtype=np.float32)


def test_nothing_is_done_for_whoever_waits_for_its_pages(decoder: VllmDecoder) -> None:
    """Steps would keep the thread that puts the pages in their place from its work."""
    decoder.reserve(ask("waits"))
    for _ in range(5):
        if not decoder.has_work:
            break
        decoder.step()
    assert not decoder.has_work
    hand_over(decoder, "waits")
    assert not decoder.has_work
    decoder.start("waits", NO_LOGITS)
    assert drain(decoder) == 20
    assert decoder.usage == 0.0


def test_a_step_is_launched_on_the_stream_on_which_all_was_loaded(
    decoder: VllmDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before anything of it is: vLLM would go over to another one in its midst."""
    core: Any = cast("VllmCore", decoder._core)
    order: list[str] = []
    step = core._core.step_fn

    def stepped() -> Any:
        order.append("step")
        return step()

    monkeypatch.setattr(core._stream, "take", lambda: order.append("take"))
    monkeypatch.setattr(core._core, "step_fn", stepped)
    decoder.admit(ask("taken", max_tokens=1))
    drain(decoder)
    assert order == ["take", "step"] * (len(order) // 2)
    assert order


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_that_nobody_asked_for_needs_no_prompts(started: VllmDecoder, mixed: bool) -> None:
    """As vLLM makes one up to capture a graph, or where other ranks alone have work."""
    executor: Any = cast("VllmCore", started._core)._core.model_executor
    runner = executor.driver_worker.worker.model_runner
    # Else those of earlier sequences are left there.
    runner.input_batch.num_prompt_tokens_cpu_tensor.zero_()
    runner._dummy_run(4, force_attention=True, create_mixed_batch=mixed)


def ask(name: str, **sampling: Any) -> GenerationRequest:
    asked = {"max_tokens": 20, "temperature": 0.0, "ignore_eos": True, **sampling}
    prompt = np.arange(TOKENS, dtype=np.int32) % 250
    return GenerationRequest(name, prompt, SamplingParameters(**asked), time.time())


def hand_over(decoder: VllmDecoder, name: str) -> None:
    """Pages of nothing in particular."""
    shape = (pages_for(TOKENS), decoder.pool.geometry.num_kv_heads, 2, PAGE_TOKENS, 64)
    for layer in range(decoder.pool.geometry.num_layers):
        decoder.receive(name, Place(layer, 0, 0), Pages(torch.full(shape, 0.01)))


def drain(decoder: VllmDecoder) -> int:
    """Steps until nothing is left; returns how many tokens came."""
    count = 0
    for _ in range(400):
        if not decoder.has_work:
            return count
        count += sum(
            len(output.tokens) for _, output in decoder.step() if isinstance(output, Delta)
        )
    raise AssertionError("it never ends")


def said(decoder: VllmDecoder, request: GenerationRequest) -> Delta:
    """What one choice is told of a prompt that vLLM computes, all in one."""
    decoder.admit(request, decoder.prepare(request))
    deltas: list[Delta] = []
    while decoder.has_work:
        deltas += [output for _, output in decoder.step() if isinstance(output, Delta)]
    tokens = tuple(token for each in deltas for token in each.tokens)
    return Delta(0, "".join(each.text for each in deltas), tokens, deltas[-1].finish_reason)


def test_every_token_is_held_to_a_form(decoder: VllmDecoder) -> None:
    """Whichever step is under way when the next one's mask is asked for."""
    form = 'start: "it is " ("true" | "false") "."'
    drawn = ask("formed", temperature=2.0, seed=4, grammar=form)
    answer = said(decoder, drawn)
    assert answer.text in ("it is true.", "it is false.")
    assert answer.finish_reason == "stop"
    assert decoder.usage == 0.0


@pytest.mark.parametrize("had", [1, 7, 19])
def test_an_answer_that_is_begun_again_goes_on_with_the_same_tokens(
    decoder: VllmDecoder, had: int
) -> None:
    """What the client has is generated in silence, with the draws that it cost, and penalties."""
    fields: dict[str, Any] = {"temperature": 1.5, "seed": 6, "frequency_penalty": 0.5}
    whole = said(decoder, ask(f"whole-{had}", **fields))
    tokens = tuple(token.token_id for token in whole.tokens)
    again = replace(ask(f"again-{had}", **fields), replayed=(tokens[:had],))
    rest = said(decoder, again)
    assert tuple(token.token_id for token in rest.tokens) == tokens[had:]
    assert whole.text.endswith(rest.text)
    assert decoder.usage == 0.0


@pytest.mark.parametrize("choices", [1, 3])
@pytest.mark.parametrize("start", [1, 2])
@pytest.mark.parametrize("steps", range(7))
def test_whoever_leaves_at_whatever_moment_leaves_no_block(
    decoder: VllmDecoder, steps: int, start: int, choices: int
) -> None:
    """With a second request beside it, which has all of its tokens."""
    name = f"left-{steps}-{start}-{choices}"
    decoder.reserve(ask(name, choices=choices))
    decoder.admit(ask(f"{name}-beside"))
    for number in range(steps):
        decoder.step()
        if number + 1 == start:
            hand_over(decoder, name)
            decoder.start(name, NO_LOGITS)
    before = decoder.num_generating
    decoder.cancel(name)
    assert decoder.num_generating == before - (steps >= start)
    # It has had some already.
    assert 20 >= drain(decoder) > 0
    assert decoder.usage == 0.0
    assert not decoder.has_work


def test_whoever_leaves_beside_one_that_waits_leaves_no_block(decoder: VllmDecoder) -> None:
    """vLLM frees blocks that are written from elsewhere a step later, and nobody else makes one."""
    decoder.reserve(ask("waits"))
    decoder.reserve(ask("leaves"))
    for _ in range(3):
        decoder.step()
    both = decoder.usage
    decoder.cancel("leaves")
    drain(decoder)
    assert decoder.usage == both / 2 > 0
    decoder.cancel("waits")
    drain(decoder)
    assert decoder.usage == 0.0


def test_choices_find_the_prompt_that_the_first_one_has(decoder: VllmDecoder) -> None:
    """They never take more pages than were counted for them: 2 of the prompt's are shared."""
    decoder.reserve(ask("many", choices=3))
    decoder.step()
    hand_over(decoder, "many")
    decoder.start("many", NO_LOGITS)
    least = PAGES
    count = 0
    while decoder.has_work:
        count += sum(len(o.tokens) for _, o in decoder.step() if isinstance(o, Delta))
        least = min(least, round((1 - decoder.usage) * PAGES))
    assert count == 3 * 20
    assert PAGES - least <= 2 + 3
    assert decoder.usage == 0.0
    assert decoder.num_preemptions == 0


def test_what_a_choice_left_to_the_others_is_not_counted_again(decoder: VllmDecoder) -> None:
    """The first one has ended, and the others have no page of their own yet."""
    decoder.reserve(ask("ends", choices=2, max_tokens=1))
    decoder.step()
    hand_over(decoder, "ends")
    decoder.start("ends", NO_LOGITS)
    while not any(isinstance(output, Delta) for _, output in decoder.step()):
        pass
    # 2 whole pages of the prompt are kept, and the second choice takes 1 of its own.
    assert decoder._core.num_pages_of(["ends/0"]) == 2
    assert decoder._promised == 1
    assert drain(decoder) == 1
    assert decoder.usage == 0.0


def test_tokens_of_a_prompt_that_has_its_own_hashes_are_not_looked_at(
    decoder: VllmDecoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a million it takes some tenths of a second, in which nobody gets a token."""
    core: Any = cast("VllmCore", decoder._core)
    monkeypatch.setattr(core._scheduler, "_alike_up_to", TOKENS - 1)
    decoder.reserve(ask("handed-off"))
    decoder.admit(ask("computed-here"))
    decoder.step()
    assert core._sequences["handed-off/0"].cache_salt is None
    assert "longreach" in core._sequences["computed-here/0"].cache_salt
    decoder.cancel("handed-off")
    drain(decoder)
    assert decoder.usage == 0.0
