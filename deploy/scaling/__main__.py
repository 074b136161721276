"""Draws docs/figures/autoscaling.png, and says what the policy saves and costs."""

from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from ...cluster.settings import AutoscalingSettings
from .simulation import Outcome, Simulation, Sizes
from .trace import day

PICTURE = Path(__file__).resolve().parents[2] / "docs" / "figures" / "autoscaling.png"


def main() -> None:
    """One day with the policy, and one with as many as there may be."""
    sizes, settings, prompts = Sizes(), AutoscalingSettings(), day()
    scaled = Simulation(sizes, settings).run(prompts)
    fixed = Simulation(sizes, settings, scaled=False).run(prompts)
    for name, outcome in (("scaled", scaled), ("fixed", fixed)):
        waits = np.percentile(outcome.waits, [50, 95, 99])
        print(
            f"{name}: {outcome.gpu_hours:.0f} GPU hours; a prompt waits {waits[0]:.0f} s (median), "
            f"{waits[1]:.0f} s (95 %), {waits[2]:.0f} s (99 %)"
        )
    draw(scaled, settings, sizes, PICTURE)


def draw(outcome: Outcome, settings: AutoscalingSettings, sizes: Sizes, path: Path) -> None:
    """Load above, and what there is of gangs and decode replicas below."""
    hours = np.array([moment.at for moment in outcome.moments]) / 3600
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    above, below = figure.subplots(2, 1, sharex=True)
    seconds = [moment.waiting / sizes.gang_speed / moment.gangs for moment in outcome.moments]
    above.plot(hours, seconds, color="#2563c9", label="seconds of computing that wait for a gang")
    above.axhline(settings.queue_seconds, color="#b3246b", linestyle="--", label="queue_seconds")
    above.set_ylabel("seconds")
    above.legend(loc="upper right")
    below.step(hours, [each.gangs for each in outcome.moments], label="gangs", color="#2563c9")
    below.step(
        hours, [each.decode for each in outcome.moments], label="decode replicas", color="#b45309"
    )
    below.set_ylabel("replicas")
    below.set_xlabel("hour of the day")
    below.set_xlim(0, 24)
    below.legend(loc="upper right")
    figure.suptitle("Autoscaling over a simulated day")
    figure.savefig(path, dpi=120, metadata={"Software": None})


if __name__ == "__main__":
    main()
