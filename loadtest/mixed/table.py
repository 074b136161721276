"""What is sent, and what came of it, as tables for people."""

from collections import Counter
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .plan import Plan
from .record import Ask
from .slo import Slo
from .summary import ClassSummary, Spread, Summary
from .sweep import Step

_SPREADS = (
    ("first token s", "first_token", 1.0),
    ("inter-token ms", "inter_token", 1000.0),
    ("end to end s", "end_to_end", 1.0),
)
"""Title, field of a class's summary, and what a second is."""


def plan_table(plan: Plan, slo: Slo) -> Table:
    """All that a plan sends, by class."""
    made = new_table(
        "what is sent", "prompts", "requests", "tokens in", "tokens out", "first token"
    )
    for kind in plan.kinds:
        asks = [ask for ask in plan.asks if ask.kind == kind]
        limits = sorted({slo.wait(ask.tokens) for ask in asks})
        within = " or ".join(f"{each:g}" for each in limits)
        made.add_row(kind, *_sizes(asks), f"within {within} s" if limits else "")
    made.add_row("all", *_sizes(plan.asks), "", style="bold")
    return made


def _sizes(asks: Sequence[Ask]) -> tuple[str, str, str]:
    tokens, answers = (sum(ask.tokens for ask in asks), sum(ask.answer_tokens for ask in asks))
    return f"{len(asks):,}", f"{tokens:,}", f"{answers:,}"


def summary_table(summary: Summary, title: str) -> Table:
    """All classes: how many were good, and their times."""
    titles = (each[0] for each in _SPREADS)
    made = new_table(f"{title} (p50 p90 p99)", "prompts", "good", "wrong", "failed", *titles)
    for each in (*summary.kinds, summary.whole):
        made.add_row(*_cells(each), style="bold" if each is summary.whole else None)
    return made


def steps_table(steps: Sequence[Step], unit: str) -> Table:
    """The loads of a sweep, lowest first: good answers in percent, by class."""
    kinds = [each.kind for each in steps[0].summary.kinds]
    made = new_table("what holds", unit, *(f"{kind} good" for kind in kinds), "goodput /s", "holds")
    for step in sorted(steps, key=lambda each: each.load):
        shares = (f"{each.good_share:.0%}" if each.requests else "" for each in step.summary.kinds)
        goodput = f"{step.summary.good_per_second:.2f}"
        made.add_row(f"{step.load:.3g}", *shares, goodput, "yes" if step.holds else "no")
    return made


def errors(summary: Summary) -> list[str]:
    """A line for each kind of error, the most frequent first."""
    counted = Counter(summary.whole.errors)
    return [f"{count:,} x {name}" for name, count in counted.most_common()]


def new_table(title: str, *columns: str) -> Table:
    """The first column is text, the others are figures."""
    made = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=0)
    for number, name in enumerate(columns):
        made.add_column(name, justify="right" if number else "left", no_wrap=number == 0)
    return made


def _cells(each: ClassSummary) -> list[str]:
    good = f"{each.good:,} of {each.requests:,}"
    spreads = (spread_text(getattr(each, field), factor) for _, field, factor in _SPREADS)
    return [each.kind, good, f"{each.wrong:,}", f"{each.failed:,}", *spreads]


def spread_text(values: Spread | None, factor: float = 1.0) -> str:
    """p50, p90 and p99, each times a factor; nothing where there are none."""
    if values is None:
        return ""
    return " ".join(figure(each * factor) for each in (values.p50, values.p90, values.p99))


def figure(value: float) -> str:
    """Three digits, but not more than two behind the point: three of them fit into a column."""
    return f"{value:.{2 if value < 10 else 1 if value < 100 else 0}f}"
