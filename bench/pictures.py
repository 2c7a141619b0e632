"""Lines of figures as PNG; needs matplotlib, of the dependency group `plots`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Panel(NamedTuple):
    """One picture: lines over values of one axis; None where nothing could be measured."""

    title: str
    x_label: str
    y_label: str
    x: Sequence[float]
    lines: Mapping[str, Sequence[float | None]]
    names: Sequence[str] = ()  # of the values of x, if not they themselves
    y_scale: str = "log"


def draw(panels: Sequence[Panel], path: Path, columns: int = 1) -> None:
    """All panels into one file."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    lines = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(
        lines, columns, figsize=(7 * columns, 4.5 * lines), layout="constrained", squeeze=False
    )
    places = [axes for row in grid for axes in row]
    for panel, axes in zip(panels, places, strict=False):
        _panel(panel, axes)
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _panel(panel: Panel, axes: Any) -> None:  # noqa: ANN401
    for name, heights in panel.lines.items():
        style = "--s" if name.endswith("write") else "-o"
        values = [float("nan") if height is None else height for height in heights]
        axes.plot(panel.x, values, style, label=name, markersize=4)
    axes.set(
        xscale="log", yscale=panel.y_scale, xlabel=panel.x_label, ylabel=panel.y_label,
        title=panel.title,
    )  # fmt: skip
    axes.set_xticks(panel.x, panel.names or [f"{value:g}" for value in panel.x])
    axes.minorticks_off()
    if panel.y_scale == "linear":
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
