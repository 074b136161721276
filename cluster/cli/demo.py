"""The demonstration: a cluster, one long document with a hidden key, and one question.

It speaks to the cluster through the public endpoint only, as any user would.
"""

import json
import re
from dataclasses import asdict, dataclass, field

from rich.console import Console

from ...engine.model.pocket.story import PASS_KEY_QUESTION
from .. import metrics
from ..client import Answer, Endpoint
from .console import seconds_table, watch_prefill
from .needle import HiddenKey, hide_key

_ANSWER_TOKENS = 48


@dataclass(frozen=True)
class DemoOptions:
    """The same seed makes the same document; `depth` None puts the key anywhere."""

    tokens: int
    seed: int
    depth: float | None = None


@dataclass(frozen=True)
class DemoReport:
    """What came out of one question. Times are in seconds.

    `first_token` is what is left of the time to the first token after queue, prefill and
    hand-off: sampling it, and the way through HTTP. `stages` are those of the slowest ranks.
    """

    url: str
    model: str
    seed: int
    prompt_tokens: int
    depth: float
    expected: str
    answer: str
    correct: bool
    ready: float
    time_to_first_token: float
    queue: float
    prefill: float
    hand_off: float
    first_token: float
    prefill_tokens_per_second: float
    stages: dict[str, float] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON object on one line."""
        return json.dumps(asdict(self))


def ask_for_hidden_key(
    url: str, options: DemoOptions, ready: float, console: Console, api_key: str | None = None
) -> DemoReport:
    """Hide a key in a document, ask the endpoint for it and show how that goes.

    Args:
        url: of a cluster that is ready.
        ready: seconds that the cluster took to become ready; only reported.

    Raises:
        EndpointError: the endpoint could not answer.
        InvalidRequestError: no such document can be made.
    """
    endpoint = Endpoint(url, api_key)
    model = endpoint.first_model()
    hidden = hide_key(
        options.tokens,
        lambda messages: endpoint.count_tokens(model, messages),
        options.seed,
        options.depth,
    )
    console.print(
        f"asking about a prompt of {hidden.tokens:,} tokens, its key "
        f"{hidden.depth:.1%} of the way in (--seed {options.seed})"
    )
    before = endpoint.scrape()
    with watch_prefill(console) as watch:
        answer = endpoint.ask(model, hidden.messages, _ANSWER_TOKENS, watch.update)
    return _report(endpoint, model, options.seed, hidden, answer, before, ready)


def show(report: DemoReport, console: Console) -> None:
    """The answer, whether it is right, and where the time went."""
    verdict = "[bold green]right[/]" if report.correct else "[bold red]wrong[/]"
    console.print(f"question   {PASS_KEY_QUESTION}")
    console.print(f"answer     {report.answer.strip()!r}", markup=False)
    console.print(f"expected   {report.expected}: {verdict}")
    console.print(
        f"first token after {report.time_to_first_token:.2f} s; "
        f"prefill {report.prefill_tokens_per_second:,.0f} tokens/s"
    )
    parts = [
        ("queue", report.queue),
        ("prefill", report.prefill),
        ("hand-off, not hidden by prefill", report.hand_off),
        ("first token, and HTTP", report.first_token),
    ]
    title = f"time to the first token of {report.prompt_tokens:,}"
    console.print(seconds_table(title, parts, report.time_to_first_token))
    if report.stages:
        stages = sorted(report.stages.items(), key=lambda stage: -stage[1])
        console.print(seconds_table("inside prefill, slowest rank", stages, report.prefill))


def show_urls(url: str, model: str, console: Console) -> None:
    """What a person can do with a cluster that stays up."""
    body = json.dumps({"model": model, "messages": [{"role": "user", "content": "Hello"}]})
    console.print(f"\nendpoint   {url}/v1  (any OpenAI client)")
    console.print(f"metrics    {url}/metrics")
    console.print(f"try        curl {url}/v1/chat/completions \\", markup=False)
    console.print("             -H 'Content-Type: application/json' \\", markup=False)
    console.print(f"             -d '{body}'", markup=False, soft_wrap=True)
    console.print(f'or         longreach ask --base-url {url} --file DOCUMENT "question"')
    console.print("Ctrl-C stops the cluster; a second one does not wait for running requests")


def _report(
    endpoint: Endpoint,
    model: str,
    seed: int,
    hidden: HiddenKey,
    answer: Answer,
    before: dict[str, float],
    ready: float,
) -> DemoReport:
    """Put the client's figures together with what the cluster's metrics grew by."""
    after = endpoint.scrape()
    grown = {name: value - before.get(name, 0.0) for name, value in after.items()}
    queue = grown.get(f"{metrics.REQUEST_QUEUE_TIME.name}_sum", 0.0)
    prefill = grown.get(f"{metrics.REQUEST_PREFILL_TIME.name}_sum", 0.0)
    hand_off = grown.get(f"{metrics.REQUEST_HANDOFF_TIME.name}_sum", 0.0)
    stage = re.compile(re.escape(metrics.PREFILL_STAGE_SECONDS.name) + r"\{(.+)\}")
    return DemoReport(
        url=endpoint.base_url,
        model=model,
        seed=seed,
        prompt_tokens=answer.prompt_tokens,
        depth=hidden.depth,
        expected=hidden.expected,
        answer=answer.text,
        correct=is_right(answer.text, hidden.expected),
        ready=ready,
        time_to_first_token=answer.first_token,
        queue=queue,
        prefill=prefill,
        hand_off=hand_off,
        first_token=max(answer.first_token - queue - prefill - hand_off, 0.0),
        prefill_tokens_per_second=answer.prompt_tokens / (prefill or answer.first_token),
        stages={found[1]: grown[name] for name in grown if (found := stage.match(name))},
    )


def is_right(answer: str, expected: str) -> bool:
    """Whether the first number in the answer is the key: saying several is no answer."""
    return re.findall(r"\d+", answer)[:1] == [expected]
