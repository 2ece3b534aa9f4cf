"""The plot of a scaling report: points, laws with their intervals' edges left to the table, and the forecast."""
from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nextscale.data.pictures_out import writing
from nextscale.errors import MissingExtraError
from nextscale.evaluation.scaling import ScalingReport


def check_plots() -> None:
    """Raises MissingExtraError where matplotlib is missing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise MissingExtraError("matplotlib", "eval", "draw scaling laws") from None


def draw(report: ScalingReport, path: Path) -> Path:
    """One panel a law: points, the law over their range, and for loss against parameters the forecast. Learning curves
    lie under loss against compute. Raises DataError where it can't be written."""
    check_plots()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(report.points)
    shown = [name for name in names if not name.endswith("no floor")]
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure = Figure(figsize=(4.6 * columns, 3.6 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    for place, name in enumerate(shown, 1):
        axis = figure.add_subplot(rows, columns, place)
        _panel(axis, report, name)
    with writing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return path


def _panel(axis: Any, report: ScalingReport, name: str) -> None:
    if name == "loss(compute)":
        for run in report.runs:
            axis.plot([run.compute(step) for step, _ in run.curve], [loss for _, loss in run.curve], color="0.8",
                      linewidth=0.8)
    x, y = (np.array(values) for values in zip(*report.points[name], strict=True))
    axis.plot(x, y, "o", markersize=3, label="runs")
    for title, style in ((name, "-"), (f"{name}, no floor", ":")):
        law = report.laws.get(title)
        if law is not None:
            over = np.geomspace(law.lowest, law.highest, 60)
            form = f"{law.floor:.3g} + " if law.floor else ""
            axis.plot(over, law(over), style, linewidth=1, label=f"{form}({law.scale:.2g} / x)^{law.exponent:.3f}")
    if name == "loss(parameters)":
        for i, found in enumerate(report.forecast.get("held_out", [])):
            axis.plot(found["parameters"], found["predicted"], "x", color="crimson",
                      label=None if i else "forecast from the smaller sizes")
    axis.set(title=name, xscale="log", yscale="log", xlabel=name[name.index("(") + 1:-1])
    axis.grid(alpha=0.3, which="both")
    axis.legend(fontsize=7)
