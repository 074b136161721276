"""One real cluster for all tests of this folder: Ray, Serve, two prefill ranks, HTTP."""

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.app import LocalCluster, start
from longreach.cluster.settings import PrefillSettings, Settings, parse_settings
from longreach.engine.messages import Tokens
from longreach.engine.text.tokenizer import Tokenizer

from ..prometheus import free_port

MODEL = "longreach-pocket"
MOST_WAITING = 2
CHUNK_TOKENS = 1024
LONG = 60_000
"""Tokens that take long enough to be interrupted."""


def make_settings(port: int) -> Settings:
    """Small chunks, so that prompts of some thousand tokens take many; float32, so that the
    same prompt has the same answer on any mesh; few pages, so that requests wait for them; a gang
    for every prompt.
    """
    return parse_settings(
        {
            "model": {"path": "pocket", "name": MODEL, "dtype": "float32"},
            "limits": {"max_model_len": 131072, "max_queued_requests": MOST_WAITING},
            "prefill": {
                "sequence_parallel": 2,
                "chunk_tokens": CHUNK_TOKENS,
                "kv_cache_tokens": 262144,
                "cpus_per_rank": 0.5,
            },
            "decode": {"kv_cache_tokens": 164864, "cpus": 0.5, "prefill_up_to": 0},
            "ingress": {"port": port, "progress_seconds": 0.2},
            "shutdown": {"drain_seconds": 120.0},
        }
    )


def gangs_with(settings: Settings, **values: Any) -> tuple[PrefillSettings, ...]:
    """The gangs of some settings, with some values changed in each."""
    return tuple(gang.model_copy(update=values) for gang in settings.prefill)


@pytest.fixture(scope="session")
def cluster() -> Iterator[LocalCluster]:
    running = start(make_settings(free_port()))
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(make_settings(1).model.folder)


@pytest.fixture
def client(cluster: LocalCluster) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{cluster.url}/v1", api_key="none", max_retries=0) as made:
        yield made


@pytest.fixture
def http(cluster: LocalCluster) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=cluster.url, timeout=120) as made:
        yield made


def make_prompt(tokenizer: Tokenizer, tokens: int) -> Tokens:
    """Plain text of exactly so many tokens of the byte-level pocket model."""
    words = " ".join(f"word{number}" for number in range(tokens))
    return tokenizer.encode(words)[:tokens]


def scrape(http: httpx.Client) -> dict[tuple[str, ...], float]:
    """(sample name, *sorted label values without the model's) -> value."""
    samples: dict[tuple[str, ...], float] = {}
    for family in text_string_to_metric_families(http.get("/metrics").text):
        for sample in family.samples:
            labels = {k: v for k, v in sample.labels.items() if k != "model_name"}
            samples[(sample.name, *(labels[name] for name in sorted(labels)))] = sample.value
    return samples


def computed(http: httpx.Client) -> float:
    """Share of the prefill pool in use: whether a prompt is being computed."""
    return scrape(http).get(("longreach_kv_cache_usage_perc", "prefill"), 0.0)


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.05)


def pages_held(http: httpx.Client) -> dict[str, float]:
    """Share of pages in use by role."""
    usage = "longreach_kv_cache_usage_perc"
    return {key[1]: value for key, value in scrape(http).items() if key[0] == usage}


def wait_until_no_page_is_held(http: httpx.Client, seconds: float = 10) -> None:
    wait_for(lambda: not any(pages_held(http).values()), seconds, "no page held")


def actor_pids(name: str, ancestor: int | None = None) -> list[int]:
    """Processes of actors by the title that Ray gives them, those that descend from a process.

    Args:
        ancestor: its id; this test's own by default.
    """
    ancestor = ancestor or os.getpid()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            title = (folder / "cmdline").read_bytes().decode(errors="replace")
        except OSError:
            continue
        if title.startswith(f"ray::{name}") and _descends_from(ancestor, int(folder.name)):
            found.append(int(folder.name))
    return found


def has_torch(pid: int) -> bool:
    """Whether a process has loaded it, by whatever way."""
    return "libtorch" in Path(f"/proc/{pid}/maps").read_text()


def _descends_from(ancestor: int, pid: int) -> bool:
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            stat = Path(f"/proc/{pid}/stat").read_text()
        except OSError:
            return False
        pid = int(stat.rpartition(")")[2].split()[1])
    return False


def ask_body(prompt: Tokens, **fields: Any) -> dict[str, Any]:
    return {"model": MODEL, "prompt": prompt.tolist(), "temperature": 0, "max_tokens": 4, **fields}
