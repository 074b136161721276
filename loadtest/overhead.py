"""What a request costs besides computing: one token in, one token out, many times.

    python -m longreach.loadtest.overhead --base-url http://127.0.0.1:8000 --requests 300

Prints the median and the 95th percentile, in milliseconds, of the whole request as the client sees
it and of its parts: `ingress` is HTTP, validation and the way to a decode replica and back;
`messages` is what the decode replica, the gang and their workers say to each other; `computed` is
what ranks and sampler did.
"""

import argparse
import statistics
import time
from dataclasses import dataclass

import httpx

from .endpoint import Endpoint

_WARM_UP = 20


@dataclass(frozen=True)
class Sample:
    """Seconds of one request."""

    whole: float
    served: float
    computed: float

    @property
    def ingress(self) -> float:
        """Outside the decode replica."""
        return self.whole - self.served

    @property
    def messages(self) -> float:
        """Inside it, and not computing."""
        return self.served - self.computed


def measure(base_url: str, requests: int) -> list[Sample]:
    """Send requests one after the other, after a few that do not count."""
    model = Endpoint(base_url).model
    with httpx.Client(base_url=base_url, timeout=60) as client:
        samples = [_ask(client, model) for _ in range(_WARM_UP + requests)]
    return samples[_WARM_UP:]


def _ask(client: httpx.Client, model: str) -> Sample:
    body = {"model": model, "prompt": [65], "max_tokens": 1, "temperature": 0}
    started = time.perf_counter()
    answer = client.post("/v1/completions", json=body).raise_for_status()
    whole = time.perf_counter() - started
    [timings] = answer.json()["longreach"]["timings"]
    return Sample(whole, timings["served"], sum(timings["prefill_stages"].values()))


def percentiles(values: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    cuts = statistics.quantiles(values, n=20)
    return statistics.median(values), cuts[-1]


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description="What a request costs besides computing.")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000")
    parser.add_argument("--requests", type=int, default=300)
    options = parser.parse_args()
    samples = measure(options.base_url, options.requests)
    print(f"{len(samples)} requests       median ms   95 % ms")
    for name in ("whole", "ingress", "messages", "computed"):
        median, high = percentiles([getattr(sample, name) for sample in samples])
        print(f"{name:<20} {median * 1000:9.1f} {high * 1000:9.1f}")


if __name__ == "__main__":
    main()
