"""vLLM's own metrics, as a scrape has them: `make test-vllm`."""

import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from longreach.cluster.metrics import render
from longreach.cluster.metrics.exporter import export
from longreach.engine.messages import Delta, GenerationRequest, SamplingParameters
from longreach.plugins.vllm_decode.decoder import VllmDecoder

from ...prometheus import free_port, prometheus_server, wait_for_value
from .test_vllm_core import NO_LOGITS, TOKENS, ask, drain, hand_over

pytestmark = pytest.mark.live

Samples = dict[tuple[str, ...], float]
OWN = ("engine", "model_name", "role", "pid")


def scraped(folder: Path) -> Samples:
    """(name, values of the labels that are not every series') -> value."""
    found: Samples = {}
    for family in text_string_to_metric_families(render(folder).decode()):
        for sample in family.samples:
            apart = [value for name, value in sample.labels.items() if name not in OWN]
            key = (sample.name, *sorted(apart))
            assert key not in found, "two series look the same"
            found[key] = sample.value
            assert sample.labels.get("engine", "0") == "0"
            assert ("pid" in sample.labels) == (family.type == "gauge")
            assert sample.labels["model_name"] == "pocket"
    return found


class Grown:
    """How much counts have grown since this was made."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._before = folder, scraped(folder)

    def __call__(self, *key: str) -> float:
        return scraped(self._folder).get(key, 0.0) - self._before.get(key, 0.0)


def test_a_request_shows_in_vllms_counts(decoder: VllmDecoder, figures: Path) -> None:
    grown = Grown(figures)
    decoder.admit(ask("counted", max_tokens=20))
    assert drain(decoder) == 20
    assert grown("vllm:generation_tokens_total") == 20
    assert grown("vllm:prompt_tokens_total") == TOKENS
    assert grown("vllm:request_success_total", "length") == 1
    assert grown("vllm:time_to_first_token_seconds_count") == 1
    assert grown("vllm:inter_token_latency_seconds_count") == 19
    assert grown("vllm:request_generation_tokens_sum") == 20
    assert grown("vllm:e2e_request_latency_seconds_count") == 1
    assert 0 < grown("vllm:request_inference_time_seconds_sum") < 60
    assert grown("vllm:e2e_request_latency_seconds_sum") < 60
    samples = scraped(figures)
    assert samples["vllm:num_requests_running",] == 0
    assert samples["vllm:kv_cache_usage_perc",] == 0
    assert any(name == "vllm:cache_config_info" for name, *_ in samples)


def test_tokens_that_a_gang_computed_are_no_work_of_vllms(
    decoder: VllmDecoder, figures: Path
) -> None:
    # An id never comes twice: its pages would be found.
    name, grown = f"handed-{time.time()}", Grown(figures)
    decoder.reserve(ask(name, max_tokens=5))
    decoder.step()
    assert scraped(figures)["vllm:kv_cache_usage_perc",] > 0
    hand_over(decoder, name)
    decoder.start(name, NO_LOGITS)
    assert drain(decoder) == 5
    assert grown("vllm:generation_tokens_total") == 5
    assert grown("vllm:prompt_tokens_by_source_total", "external_kv_transfer") == TOKENS
    assert grown("vllm:prompt_tokens_by_source_total", "local_compute") == 0


def test_answers_that_end_here_are_successes_and_those_that_are_left_are_not(
    decoder: VllmDecoder, figures: Path
) -> None:
    """vLLM knows nothing of stop strings."""
    grown = Grown(figures)
    decoder.admit(ask("whole", max_tokens=60))
    outputs: list[Any] = []
    while decoder.has_work:
        outputs += decoder.step()
    said = "".join(output.text for _, output in outputs if isinstance(output, Delta))
    assert len(said) > 10
    stopped = ask("stopped", max_tokens=60, stop=(said[5:9],))
    decoder.admit(stopped)
    assert 0 < drain(decoder) < 60
    decoder.admit(ask("left", max_tokens=60))
    decoder.step()
    decoder.cancel("left")
    drain(decoder)
    assert grown("vllm:request_success_total", "length") == 1
    assert grown("vllm:request_success_total", "stop") == 1
    assert grown("vllm:e2e_request_latency_seconds_count") == 2


def test_a_real_prometheus_reads_vllms_families(
    decoder: VllmDecoder, figures: Path, tmp_path: Path
) -> None:
    prompt = np.full(150, 65, dtype=np.int32)
    sampling = SamplingParameters(max_tokens=8, temperature=0.0, ignore_eos=True)
    decoder.admit(GenerationRequest("scraped", prompt, sampling, time.time()))
    assert drain(decoder) == 8
    expected = scraped(figures)["vllm:generation_tokens_total",]
    port = free_port()
    server, thread = export(figures, "127.0.0.1", port)
    try:
        with prometheus_server(tmp_path, {"cluster": [f"127.0.0.1:{port}"]}) as url:
            wait_for_value(url, "sum(vllm:generation_tokens_total)", expected)
            within = 'sum(vllm:inter_token_latency_seconds_bucket{le="+Inf"})'
            wait_for_value(url, f"{within} == bool sum(vllm:inter_token_latency_seconds_count)", 1)
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
