"""Records as measurements make them."""

from dataclasses import replace

from longreach.loadtest.mixed.record import Ask, Failure, FailureKind, Record, Verdict


def record(
    wait: float = 0.5,
    gaps: tuple[float, ...] = (0.01, 0.03),
    tokens: int = 1_000,
    kind: str = "1K",
    verdict: Verdict | None = Verdict.RIGHT,
    sent: float = 0.0,
) -> Record:
    """An answer of as many texts as gaps, and one; each has a token."""
    ask = Ask(0, sent, kind, tokens, 16)
    ended = wait + sum(gaps)
    return Record(ask, sent, 0.0, wait, gaps, ended, tokens, len(gaps) + 1, verdict, None)


def failed(
    why: FailureKind = FailureKind.CUT,
    status: int | None = None,
    kind: str = "1K",
    tokens: int = 1_000,
) -> Record:
    """One that did not come whole."""
    failure = Failure(why, "said", status)
    return replace(record(kind=kind, tokens=tokens), verdict=None, failure=failure)
