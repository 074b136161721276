"""A shape with random weights, as a prefill rank and a decode worker serve it."""

import shutil
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest

from longreach.cluster.decode.engines import make_engine
from longreach.cluster.prefill.rank import Meeting, PrefillRank
from longreach.cluster.prefill.scheduler import Chunk
from longreach.cluster.settings import Settings, check_model
from longreach.engine.decode.decoder import Decoder
from longreach.engine.kv.destination import Destination
from longreach.engine.local import DirectHandOff
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters
from longreach.engine.model import files as models
from longreach.engine.model.pocket import CHECKPOINT

from .conftest import gangs_with, make_settings

NAMES = ("config.json", "generation_config.json", "sparse_attention_config.json")


@pytest.fixture
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """Of a shape as small as the pocket model: no weights and no tokenizer in its folder."""
    for name in NAMES:
        shutil.copy(CHECKPOINT / name, tmp_path / name)
    monkeypatch.setattr(models, "known_shapes", lambda: {"small": tmp_path})
    made = make_settings(1)
    sizes = {"sequence_parallel": 1, "kv_cache_tokens": 2048}
    return made.model_copy(
        update={
            "model": made.model.model_copy(update={"path": "random/small"}),
            "prefill": gangs_with(made, **sizes),
            "decode": made.decode.model_copy(update={"kv_cache_tokens": 2048}),
        }
    )


@pytest.mark.parametrize("kv_cache_dtype", ["auto", "fp8_e4m3"])
def test_prefill_and_decode_make_up_the_same_weights(
    settings: Settings, monkeypatch: pytest.MonkeyPatch, kv_cache_dtype: str
) -> None:
    """The second token is the one that prefilling the first would have brought."""
    model = settings.model.model_copy(update={"kv_cache_dtype": kv_cache_dtype})
    settings = settings.model_copy(update={"model": model})
    check_model(settings)
    decoder = make_engine(settings.worker, Mock())
    assert isinstance(decoder, Decoder)
    monkeypatch.setattr(PrefillRank, "_open", lambda _, to: DirectHandOff(decoder, to.request_id))
    rank = PrefillRank(settings.gangs[0])
    rank.join(Meeting.of_one(), 0, 1)

    def run(name: str, prompt: np.ndarray, max_tokens: int) -> Any:
        sampling = SamplingParameters(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
        decoder.reserve(GenerationRequest(name, prompt, sampling, 0.0))
        chunk = Chunk(name, 0, len(prompt), True)
        rank.begin_chunk(chunk, prompt, Destination(name, done=0))
        logits = rank.finish_chunk(chunk).logits
        assert logits is not None
        outputs = decoder.start(name, logits)
        while decoder.has_work:
            outputs += decoder.step()
        return [o.tokens[0].token_id for _, o in outputs if isinstance(o, Delta)]

    prompt = np.random.default_rng(0).integers(0, 256, 300).astype(np.int32)
    first, second = run("a", prompt, 2)
    assert run("b", np.append(prompt, np.int32(first)), 1) == [second]
