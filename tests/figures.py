"""Figures that the nodes of a cluster have written down, as their exporters would say them."""

from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample

from longreach.cluster.metrics import render


def samples_on(node: Path) -> Iterator[Sample]:
    """Every figure in a node's folder."""
    families = text_string_to_metric_families(render(node).decode())
    return (sample for family in families for sample in family.samples)


def counted(figures: Path, name: str) -> float:
    """A counter of all nodes together, as Prometheus would add up; those that are gone count too.

    Of requests by outcome, those that ended well.

    Args:
        figures: has a folder for each node, once one has written.
    """
    return sum(
        sample.value
        for node in (figures.iterdir() if figures.exists() else ())
        for sample in samples_on(node)
        if sample.name == name and sample.labels.get("outcome", "success") == "success"
    )
