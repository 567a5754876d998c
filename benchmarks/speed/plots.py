"""Two kinds of picture as SVG: bars on a logarithmic axis, and curves on two logarithmic axes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from html import escape

COLORS = ("#1b7f79", "#c8553d", "#5b5f97", "#b08900", "#7a8450", "#a34f8a")
"""The first is this package's."""

INK, FAINT = "#222222", "#dddddd"
WIDTH, LEFT, RIGHT, ROW = 820, 250, 150, 22

Bar = tuple[str, float, float, float]
"""Label, median, first and third quartile."""


def bars(title: str, groups: Mapping[str, Sequence[Bar]], show: Callable[[float], str]) -> str:
    """Groups of bars with whiskers over the middle half of the measurements; equal labels have equal colours.

    Behind a bar stand its median and, from the second on, the median's ratio to the first of its group.
    """
    labels = list(dict.fromkeys(bar[0] for rows in groups.values() for bar in rows))
    values = [value for rows in groups.values() for bar in rows for value in bar[1:]]
    low, high = 10 ** math.floor(math.log10(min(values))), 10 ** math.ceil(math.log10(max(values)) + 1e-9)
    scale = (WIDTH - LEFT - RIGHT) / max(1e-9, math.log10(high / low))

    def place(value: float) -> float:
        return LEFT + scale * math.log10(value / low)

    parts, y = [_text(10, 24, title, size=16, weight="bold")], 44
    for name, rows in groups.items():
        parts.append(_text(10, y + 15, name, weight="bold"))
        y += ROW
        for label, median, q1, q3 in rows:
            told = show(median) if label == rows[0][0] else f"{show(median)}, {median / rows[0][1]:.3g}×"
            color = COLORS[labels.index(label) % len(COLORS)]
            parts += [
                _text(LEFT - 8, y + 15, label, anchor="end"),
                f'<rect x="{LEFT}" y="{y + 3}" width="{place(median) - LEFT:.1f}" height="{ROW - 7}" fill="{color}"/>',
                _line(place(q1), y + ROW / 2, place(q3), y + ROW / 2, INK),
                _text(max(place(median), place(q3)) + 6, y + 15, told),
            ]
            y += ROW
        y += 8
    grid = []
    for power in range(round(math.log10(low)), round(math.log10(high)) + 1):
        grid += [_line(place(10**power), 40, place(10**power), y, FAINT)]
        grid += [_text(place(10**power), y + 16, show(10**power), anchor="middle", size=11)]
    return _svg(y + 28, grid + parts)


def curves(
    title: str, x_label: str, series: Mapping[str, Sequence[tuple[float, float]]], show: Callable[[float], str]
) -> str:
    """One line per series of (x, y) points, both axes logarithmic; the dashed line through the first point is y ∝ x."""
    points = [point for line in series.values() for point in line]
    x_low, x_high = min(x for x, _ in points), max(x for x, _ in points)
    y_low, y_high = (f(y for _, y in points) for f in (min, max))
    left, top, width, height = 90, 44, 520, 260

    def place(x: float, y: float) -> tuple[float, float]:
        across = math.log(x / x_low) / max(1e-9, math.log(x_high / x_low))
        up = math.log(y / y_low) / max(1e-9, math.log(y_high / y_low))
        return left + width * across, top + height * (1 - up)

    parts = [_text(10, 24, title, size=16, weight="bold")]
    for x in sorted({x for x, _ in points}):
        parts += [_line(place(x, y_low)[0], top, place(x, y_low)[0], top + height, FAINT)]
        parts += [_text(place(x, y_low)[0], top + height + 16, f"{x:g}", anchor="middle", size=11)]
    for y in (y_low, math.sqrt(y_low * y_high), y_high):
        parts += [_line(left, place(x_low, y)[1], left + width, place(x_low, y)[1], FAINT)]
        parts += [_text(left - 6, place(x_low, y)[1] + 4, show(y), anchor="end", size=11)]
    parts.append(_text(left + width / 2, top + height + 34, x_label, anchor="middle"))
    for index, (name, line) in enumerate(series.items()):
        color = COLORS[index % len(COLORS)]
        path = " ".join(f"{px:.1f},{py:.1f}" for px, py in (place(*point) for point in line))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="2.5"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{color}"/>'
            for px, py in (place(*point) for point in line)
        ]
        parts.append(_text(left + width + 12, top + 16 + ROW * index, name, fill=color))
    x, y = next(iter(series.values()))[0]
    end = min(x_high, x * y_high / y)
    parts.append(_line(*place(x, y), *place(end, y * end / x), INK, dash="5 5"))
    return _svg(top + height + 48, parts)


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", size: int = 13, weight: str = "normal", fill: str = INK
) -> str:
    style = f'text-anchor="{anchor}" font-size="{size}" font-weight="{weight}" fill="{fill}"'
    return f'<text x="{x:.1f}" y="{y:.1f}" {style}>{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, color: str, *, dash: str = "none") -> str:
    where = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {where} stroke="{color}" stroke-width="1.5" stroke-dasharray="{dash}"/>'


def _svg(height: float, parts: Sequence[str]) -> str:
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" font-family="system-ui, sans-serif">'
    return "\n".join([head, f'<rect width="{WIDTH}" height="{height:.0f}" fill="#ffffff"/>', *parts, "</svg>\n"])
