"""What is kept of a measurement: figures for programs, a picture for people."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from ..commit import commit
from ..endpoint import Endpoint
from ..prompts import TextSize
from .files import request_row, summary_object, summary_rows, write_csv, write_json
from .options import Options
from .run import Result
from .slo import Slo
from .summary import Summary
from .sweep import Step, highest


@dataclass(frozen=True)
class Results:
    """A folder, and what its files say they are of."""

    folder: Path
    options: Options
    slo: Slo
    about: dict[str, Any]

    @classmethod
    def new(
        cls,
        folder: Path,
        started: datetime,
        options: Options,
        slo: Slo,
        endpoint: Endpoint,
        size: TextSize,
    ) -> "Results":
        """Makes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "started": started.isoformat(timespec="seconds"),
            "url": endpoint.url,
            "model": endpoint.model,
            "characters_per_token": round(size.characters_per_token, 3),
            "template_tokens": round(size.template_tokens),
            "client_cpus": os.cpu_count(),
            "commit": commit(),
            "options": options.model_dump(mode="json"),
        }
        return cls(folder, options, slo, about)

    def keep_run(self, result: Result) -> None:
        """Of one load: run.json, requests.csv, summary.csv and picture.png."""
        rows = [request_row(record, self.slo) for record in result.records]
        summary, load = result.summary, str(result.plan.load)
        write_json(
            self.folder / "run.json", self.about, summary=summary_object(summary), requests=rows
        )
        write_csv(self.folder / "summary.csv", summary_rows(load, summary))
        if not rows:
            # Ended by hand before the first one was sent.
            return
        write_csv(self.folder / "requests.csv", rows)
        # Late and last, as matplotlib is heavy, and whatever it does, the figures are kept.
        from .picture import draw_run

        title = self._title(f"{load}: {_in_words(summary)}")
        draw_run(result.records, summary, self.slo, title, self.folder / "picture.png")

    def keep_sweep(self, steps: Sequence[Step], unit: str) -> None:
        """Of all loads that were tried: sweep.json, summary.csv and picture.png."""
        objects = [
            {"load": step.load, "holds": step.holds, "summary": summary_object(step.summary)}
            for step in steps
        ]
        most = highest(steps)
        write_json(self.folder / "sweep.json", self.about, highest=most, steps=objects)
        rows = [row for step in steps for row in summary_rows(f"{step.load:.4g}", step.summary)]
        write_csv(self.folder / "summary.csv", rows)
        from .picture import draw_sweep

        found = "none holds" if most is None else f"{most:.3g} is the highest that holds"
        title = self._title(f"{unit}: {found} ({self.options.hold:.0%} good in every class)")
        draw_sweep(steps, self.options.hold, unit, title, self.folder / "picture.png")

    def _title(self, found: str) -> str:
        lines = [f"{self.about['model']}: {found}", self.options.note]
        return "\n".join(line for line in lines if line)


def _in_words(summary: Summary) -> str:
    good = f"{summary.whole.good} of {summary.whole.requests} answers good"
    return f"{good}, {summary.good_per_second:.2f} good a second"
