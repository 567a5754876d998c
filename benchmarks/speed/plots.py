"""Two kinds of plot: bars on a logarithmic axis, and curves on two logarithmic axes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from pamm.drawing.plots import new_figure

if TYPE_CHECKING:
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

COLORS = ("#1b7f79", "#c8553d", "#5b5f97", "#b08900", "#7a8450", "#a34f8a")
"""The first is this package's."""

ROW = 22
"""Height of a bar with the space around it, pixels."""

Bar = tuple[str, float, float, float]
"""Label, median, first and third quartile."""


def bars(title: str, groups: Mapping[str, Sequence[Bar]], show: Callable[[float], str]) -> Figure:
    """Groups of bars with whiskers over the middle half of the measurements; equal labels have equal colours.

    Behind a bar stand its median and, from the second on, the median's ratio to the first of its group.
    """
    labels = list(dict.fromkeys(bar[0] for rows in groups.values() for bar in rows))
    count = sum(len(rows) + 1.3 for rows in groups.values())
    figure = new_figure(900, ROW * (count + 3))
    axes, y, names = figure.subplots(), 0.0, {}
    left = axes.get_yaxis_transform()
    for group, rows in groups.items():
        axes.text(0.005, y, group, transform=left, weight="bold", va="center")
        for label, median, q1, q3 in rows:
            y += 1
            names[y] = label
            color = COLORS[labels.index(label) % len(COLORS)]
            axes.barh(y, median, 0.7, color=color, xerr=[[median - q1], [q3 - median]], error_kw={"elinewidth": 1.5})
            told = show(median) if label == rows[0][0] else f"{show(median)}, {_ratio(median / rows[0][1])}×"
            axes.annotate(told, (max(median, q3), y), (5, 0), textcoords="offset points", va="center")
        y += 1.3
    axes.set_title(title, loc="left", weight="bold")
    axes.set_yticks(list(names), names.values())
    axes.set(xscale="log", ylim=(y - 0.4, -0.8))
    axes.margins(x=0.15)
    _finish(axes.xaxis, show)
    axes.tick_params(axis="y", length=0)
    return figure


def curves(
    title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]], show: Callable[[float], str]
) -> Figure:
    """One line per series of (x, y) points, both axes logarithmic; equal steps of both are equally long; dashed: y ∝ x."""
    figure = new_figure(640, 420)
    axes = figure.subplots()
    for color, (name, line) in zip(COLORS, series.items(), strict=False):
        axes.plot(*zip(*line, strict=True), "o-", color=color, label=name, linewidth=2, markersize=5)
    x, y = next(iter(series.values()))[0]
    axes.axline((x, y), (2 * x, 2 * y), color="black", linestyle="--", linewidth=1)
    axes.set(xscale="log", yscale="log", xlabel=x_label)
    axes.set_aspect("equal", adjustable="datalim")
    axes.apply_aspect()
    axes.set_title(title, loc="left", weight="bold")
    axes.legend(frameon=False)
    _finish(axes.xaxis, "{:g}".format, sorted({x for line in series.values() for x, _ in line}))
    _finish(axes.yaxis, show)
    return figure


def _ratio(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _finish(axis: Axis, show: Callable[[float], str], ticks: Sequence[float] = ()) -> None:
    """Labels by `show` at the ticks given, by default at powers of ten, of a short axis at 2 and 5 too; faint lines behind."""
    from matplotlib.ticker import FixedLocator, LogLocator, NullLocator

    low, high = axis.get_view_interval()
    axis.set_major_locator(FixedLocator(ticks) if ticks else LogLocator(subs=(1, 2, 5) if high < 1000 * low else (1,)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: show(value))
    axis.grid(color="#dddddd")
    axis.set_tick_params(length=0)
    axis.axes.set_axisbelow(True)
    axis.axes.spines[:].set_visible(False)
