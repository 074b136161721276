"""What came of many requests: percentiles, goodput, and errors by kind, for each class."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from .record import Record, Verdict
from .slo import Slo

ALL = "all"


@dataclass(frozen=True)
class Spread:
    """Percentiles, between the two nearest values where there is none just there."""

    p50: float
    p90: float
    p99: float


def spread(values: Sequence[float]) -> Spread | None:
    """Of values in any order; None where there are none."""
    if not values:
        return None
    return Spread(*(float(each) for each in np.percentile(values, (50, 90, 99))))


@dataclass(frozen=True)
class ClassSummary:
    """One class of prompts. Times are seconds, and those of answers that came whole.

    Attributes:
        good: answered as the SLO wants it.
        errors: how many failed, by the name of the failure.
        first_token: from sending to the first text.
        inter_token: between one text and the next, of all answers together.
        per_token: the mean of that for each token of an answer.
        end_to_end: from sending to the end.
        prompt_tokens, answer_tokens: as the endpoint counted, where it did.
    """

    kind: str
    requests: int
    right: int
    wrong: int
    unchecked: int
    failed: int
    good: int
    errors: Mapping[str, int]
    first_token: Spread | None
    inter_token: Spread | None
    per_token: Spread | None
    end_to_end: Spread | None
    prompt_tokens: int
    answer_tokens: int

    @property
    def good_share(self) -> float:
        """Of its requests; 0 where there are none."""
        return self.good / self.requests if self.requests else 0.0


@dataclass(frozen=True)
class Summary:
    """All classes, the shortest first, and all requests together.

    Attributes:
        seconds: from the first request to the last end.
        late: how much later than planned requests were sent; where that is not small, the load test
            had too little of a CPU, and its figures are not the endpoint's alone.
    """

    seconds: float
    late: Spread | None
    kinds: tuple[ClassSummary, ...]
    whole: ClassSummary

    @property
    def good_per_second(self) -> float:
        """Goodput: good answers a second."""
        return self.whole.good / self.seconds if self.seconds else 0.0

    @property
    def answer_tokens_per_second(self) -> float:
        """Over all answers that came whole."""
        return self.whole.answer_tokens / self.seconds if self.seconds else 0.0

    def holds(self, share: float) -> bool:
        """Whether in every class that has requests this share of them is good."""
        return all(each.good_share >= share for each in self.kinds if each.requests)


def summarize(records: Sequence[Record], kinds: Iterable[str], slo: Slo) -> Summary:
    """Of all that was sent."""
    ends = [record.sent + record.ended for record in records]
    begins = [record.sent for record in records]
    return Summary(
        seconds=max(ends) - min(begins) if records else 0.0,
        late=spread([record.late for record in records if record.ask.at is not None]),
        kinds=tuple(_of_class(kind, [r for r in records if r.ask.kind == kind], slo)
                    for kind in kinds),
        whole=_of_class(ALL, records, slo),
    )  # fmt: skip


def _of_class(kind: str, records: Sequence[Record], slo: Slo) -> ClassSummary:
    whole = [record for record in records if record.failure is None]
    verdicts = Counter(record.verdict for record in whole)
    return ClassSummary(
        kind=kind,
        requests=len(records),
        right=verdicts[Verdict.RIGHT],
        wrong=verdicts[Verdict.WRONG],
        unchecked=verdicts[Verdict.UNCHECKED],
        failed=len(records) - len(whole),
        good=sum(slo.is_met_by(record) for record in records),
        errors=dict(Counter(r.failure.name for r in records if r.failure is not None)),
        first_token=spread([r.first_token for r in whole if r.first_token is not None]),
        inter_token=spread([gap for record in whole for gap in record.gaps]),
        per_token=spread([r.per_token for r in whole if r.per_token is not None]),
        end_to_end=spread([record.ended for record in whole]),
        prompt_tokens=sum(record.prompt_tokens or 0 for record in whole),
        answer_tokens=sum(record.answer_tokens or 0 for record in whole),
    )
