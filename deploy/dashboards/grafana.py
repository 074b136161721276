"""Dashboards in Grafana's form, by its own library."""

from grafana_foundation_sdk.builders import dashboard, prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import (
    DataSourceRef,
    Threshold,
    ThresholdsMode,
    VariableRefresh,
)

from .panels import Board, Panel

_SOURCE = DataSourceRef(type_val="prometheus", uid="$datasource")
_PANEL_HEIGHT, _PANEL_WIDTH = 8, 12


def to_json(board: Board) -> str:
    """The text of a dashboard's file; the same board has the same text."""
    made = (
        dashboard.Dashboard(board.title)
        .uid(f"longreach-{board.name}")
        .tags(["longreach"])
        .refresh("30s")
        .time("now-3h", "now")
        .with_variable(dashboard.DatasourceVariable("datasource").type("prometheus"))
        .with_variable(
            dashboard.QueryVariable("model")
            .datasource(_SOURCE)
            .query("label_values(longreach_requests_total, model_name)")
            .include_all(True)
            .all_value(".*")
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    )
    if board.name == "capacity":
        for name, value in (("gpus", "8"), ("cost", "2.5")):
            made = made.with_variable(dashboard.TextBoxVariable(name).default_value(value))
    for panel in board.panels:
        made = made.with_panel(_panel(panel))
    return JSONEncoder(sort_keys=True, indent=1).encode(made.build()) + "\n"


def _panel(panel: Panel) -> timeseries.Panel:
    made = (
        timeseries.Panel()
        .title(panel.title)
        .description(panel.act)
        .unit(panel.unit)
        .min(0)
        .height(_PANEL_HEIGHT)
        .span(_PANEL_WIDTH)
        .datasource(_SOURCE)
        .thresholds(_thresholds(panel))
    )
    for number, query in enumerate(panel.queries):
        made = made.with_target(
            prometheus.Dataquery()
            .expr(query.expression)
            .legend_format(query.legend)
            .ref_id(chr(ord("A") + number))
        )
    return made


def _thresholds(panel: Panel) -> dashboard.ThresholdsConfig:
    first, then = ("red", "green") if panel.below else ("green", "red")
    steps = [Threshold(value=None, color=first)]
    if panel.red is not None:
        steps.append(Threshold(value=panel.red, color=then))
    return dashboard.ThresholdsConfig().mode(ThresholdsMode.ABSOLUTE).steps(steps)
