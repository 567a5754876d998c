"""Results as people read them: a text table, a Markdown table, and a page of numbers and pictures that needs no network."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm.data.transforms import denormalize
from pamm.drawing.sheet import draw_pair, legend, png_uri, scale_bar, scale_text
from pamm.files import distinct_stem, escaped
from pamm.tasks import Task

Row = tuple[str, Mapping[str, Mapping[str, float | None]]]
"""Name of a result, and task → metric → value; None, absent, NaN and infinite values are shown as a dash."""

REPORT = "report.html"
PICTURES = "pictures"
MISSING = "–"
SHOWN = 190
"""Width of a picture on the page, CSS pixels; smaller ones are enlarged with sharp pixels."""


# -- tables --------------------------------------------------------------------------------------------------------------


def format_table(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    *,
    gains: Sequence[float | None] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """Plain text, aligned: one row per result, one column per task's score, ↑ where higher is better and ↓ where lower.

    gains: the multi-task gain Δ of each row, percent, as a last column. columns: task → the metrics of its columns, where
    they are not its score alone.
    """
    return aligned([[cell for cell, _ in line] for line in _score_cells(rows, tasks, gains, columns)])


def aligned(table: Sequence[Sequence[str]]) -> str:
    """Lines of cells, the first of them the header → plain text in columns, the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))]).rstrip()
        for line in table
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def markdown_table(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    *,
    gains: Sequence[float | None] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """As `format_table`, for a Markdown page; the best of several rows is bold."""
    return as_markdown(_score_cells(rows, tasks, gains, columns))


def as_markdown(table: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """Lines of (text, whether it is bold), the first of them the header → a Markdown table.

    The first cell of a line is a name from outside: nothing in it has a meaning for Markdown.
    """
    lines = []
    for (name, _), *cells in table:
        escaped = [(text.replace("|", "\\|"), bold) for text, bold in cells]
        shown = [plain_markdown(name), *(f"**{text}**" if bold else text for text, bold in escaped)]
        lines.append("| " + " | ".join(shown) + " |")
    lines.insert(1, "|---|" + "---:|" * (len(table[0]) - 1))
    return "\n".join(lines) + "\n"


def plain_markdown(text: object) -> str:
    """Text in which no character has a meaning for Markdown or HTML, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~&])", r"\\\1", " ".join(str(text).split()))


def _score_cells(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    gains: Sequence[float | None] | None,
    metrics: Mapping[str, Sequence[str]] | None = None,
) -> list[list[tuple[str, bool]]]:
    """Header and rows of (text, whether it is the best of its column)."""
    header = [("", False)]
    columns = [[(name, False) for name, _ in rows]]
    for name, task in tasks.items():
        for metric in (metrics or {}).get(name, [task.score]):
            header.append((f"{name} {task.titled(metric)} {_arrow(task.higher_is_better)}", False))
            values = [row.get(name, {}).get(metric) for _, row in rows]
            columns.append(_column(values, task.higher_is_better))
    if gains is not None:
        if len(gains) != len(rows):
            raise ValueError(f"{len(gains)} gains for {len(rows)} rows; give one per row, None where there is none")
        header.append(("Δ % ↑", False))
        columns.append([(MISSING if _absent(gain) else f"{gain:+.2f}", False) for gain in gains])
    return [header, *(list(line) for line in zip(*columns, strict=True))]


def _column(values: Sequence[float | None], higher_is_better: bool | None) -> list[tuple[str, bool]]:
    """Numbers of one column with one number of decimals, that of the best, and a mark at the best of several.

    `higher_is_better` None: nothing is marked, and the largest sets the decimals.
    """
    known = [value for value in values if not _absent(value)]
    best = (min if higher_is_better is False else max)(known, default=0.0)
    digits = decimals(best)
    marked = higher_is_better is not None and len(known) > 1
    return [(MISSING, False) if _absent(v) else (f"{v:.{digits}f}", marked and v == best) for v in values]


def decimals(value: float) -> int:
    """Decimals that show four significant digits, from 2 to 4."""
    return 4 if abs(value) < 1 else max(2, 3 - math.floor(math.log10(abs(value))))


def _absent(value: float | None) -> bool:
    return value is None or not math.isfinite(value)


def _arrow(higher_is_better: bool) -> str:
    return "↑" if higher_is_better else "↓"


# -- figures -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """One image of a report with its pictures, all (H, W, 3) uint8.

    predictions: task → picture. truths: task → picture, without the tasks the image has no label for. Both share their colours.
    """

    id: str
    image: np.ndarray
    predictions: Mapping[str, np.ndarray]
    truths: Mapping[str, np.ndarray] = field(default_factory=dict)
    scales: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Task → range of values over which its colours spread, of tasks whose colours follow a range."""


@torch.no_grad()
def figure_from(
    image: Tensor, labels: Mapping[str, Tensor], logits: Mapping[str, Tensor], tasks: Mapping[str, Task], id: str
) -> Figure:
    """Draw one sample: (3, H, W) normalised image, labels task → (c, H, W), logits task → (channels, H, W).

    Prediction and truth share the truth's colour scale, that of the prediction where there is no truth. Ignored pixels of a
    truth are grey; a label that is absent or ignored everywhere counts as none.
    """
    pairs = {name: draw_pair(task, logits[name], labels.get(name)) for name, task in tasks.items()}
    return Figure(
        id,
        denormalize(image),
        {name: pair.prediction for name, pair in pairs.items()},
        {name: pair.truth for name, pair in pairs.items() if pair.truth is not None},
        {name: pair.scale for name, pair in pairs.items() if pair.scale is not None},
    )


# -- the page ------------------------------------------------------------------------------------------------------------


def write_report(
    folder: str | Path,
    *,
    title: str,
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    protocol: str,
    figures: Sequence[Figure] = (),
    extra: Mapping[str, object] | None = None,
    gains: Sequence[float | None] | None = None,
) -> Path:
    """Write <folder>/report.html with its pictures as PNG files under <folder>/pictures/; returns the page's path.

    rows: results to compare, e.g. untrained and trained, with every metric of every task. protocol: split, size and
    treatment of the numbers, in words. extra: further facts, name → value. Everything given is escaped.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    facts = "".join(f"<dt>{escape(key)}</dt><dd>{escape(value)}</dd>" for key, value in (extra or {}).items())
    parts = [
        f'<p class="protocol">{escape(protocol)}</p>',
        html_scores(rows, tasks, gains),
        f"<dl>{facts}</dl>" if facts else "",
        "<h2>All metrics</h2>",
        "".join(metric_details(name, task, rows) for name, task in tasks.items()),
        _figures(figures, tasks, folder) if figures else "",
    ]
    path = folder / REPORT
    path.write_text(html_page(title, parts), encoding="utf-8")
    return path


def html_page(title: str, parts: Sequence[str], *, style: str = "") -> str:
    """A page of results: parts of HTML below the title, which is escaped here; `style` adds to the style of all pages."""
    return _PAGE.substitute(title=escape(title), style=_STYLE + style, body="\n".join(parts))


def escape(value: object) -> str:
    """Text for a page: no mark-up, no control characters, and none that cannot be written."""
    return html.escape(escaped(str(value), keep="\n"))


def html_scores(
    rows: Sequence[Row],
    tasks: Mapping[str, Task],
    gains: Sequence[float | None] | None = None,
    columns: Mapping[str, Sequence[str]] | None = None,
) -> str:
    """As `format_table`, as HTML; the best of several rows is bold."""
    return _html_table(_score_cells(rows, tasks, gains, columns))


def _html_table(lines: Sequence[Sequence[tuple[str, bool]]]) -> str:
    """First line and first cells as headings, best values bold."""
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text, _ in lines[0])
    body = ""
    for (name, _), *cells in lines[1:]:
        values = "".join(f"<td>{f'<b>{escape(text)}</b>' if best else escape(text)}</td>" for text, best in cells)
        body += f'<tr><th scope="row">{escape(name)}</th>{values}</tr>\n'
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table></div>'


def metric_details(name: str, task: Task, rows: Sequence[Row]) -> str:
    """Every metric of a task, closed until asked for; those named "metric/class" in a table of their own."""
    metrics = dict.fromkeys(key for _, row in rows for key in row.get(name, {}))
    if not metrics:
        return ""
    groups: dict[str, list[str]] = {}
    for key in metrics:
        groups.setdefault(key.partition("/")[0] if "/" in key else "", []).append(key)
    tables = ""
    for kind, keys in groups.items():
        lines = [[(task.titled(kind) if kind else "", False), *((run, False) for run, _ in rows)]]
        for key in keys:
            better = task.higher_is_better if kind or key == task.score else None
            cells = _column([row.get(name, {}).get(key) for _, row in rows], better)
            lines.append([(key.partition("/")[2] if kind else task.titled(key), False), *cells])
        tables += _html_table(lines)
    kinds = "".join(f", {kind} of each class" for kind in groups if kind)
    better = "higher" if task.higher_is_better else "lower"
    heading = f"{name}: every metric{kinds} (score: {task.titled(task.score)}; {better} is better)"
    return f'<details><summary>{escape(heading)}</summary><div class="tables">{tables}</div></details>\n'


def _figures(figures: Sequence[Figure], tasks: Mapping[str, Task], folder: Path) -> str:
    (folder / PICTURES).mkdir(exist_ok=True)
    taken: set[str] = set()
    blocks = [_figure(figure, tasks, folder, distinct_stem(figure.id, taken)) for figure in figures]
    note = (
        "The network's prediction above, the truth below it; pixels of the truth without a label are grey. A bar gives the range "
        "of both, which is the truth's, or the prediction's where there is no truth; values beyond it have the colours of its ends."
    )
    return f"<h2>Pictures</h2><p>{note}</p>{class_legends(tasks)}\n{''.join(blocks)}"


def class_legends(tasks: Mapping[str, Task]) -> str:
    """What the colours of the tasks' pictures mean; empty where no task tells."""
    legends = ""
    for name, task in tasks.items():
        classes = legend(task)
        swatches = "".join(
            f'<li><i style="background:rgb{colour}"></i>{escape(label)}</li>' for label, colour in classes.items()
        )
        swatches = swatches or (f"<li>{escape(task.colours)}</li>" if task.colours else "")
        legends += f"<p>{escape(name)}</p><ul>{swatches}</ul>" if swatches else ""
    return f'<details class="legend" open><summary>Colours</summary>{legends}</details>' if legends else ""


def _figure(figure: Figure, tasks: Mapping[str, Task], folder: Path, stem: str) -> str:
    """One image and, per task, prediction and truth."""

    def picture(pixels: np.ndarray | None, what: str) -> str:
        if pixels is None:
            height, width = figure.image.shape[:2]
            return f'<div class="none" style="aspect-ratio: {width} / {height}">no label</div>'
        path = folder / PICTURES / f"{stem}_{what}.png"
        Image.fromarray(pixels).save(path)
        height, width = pixels.shape[:2]
        alt = escape(f"{figure.id}: {what.replace('_', ' ')}")
        source = quote(f"{PICTURES}/{path.name}")
        small = ' class="small"' if width < SHOWN else ""
        return f'<img src="{source}" width="{width}" height="{height}" alt="{alt}" loading="lazy"{small}>'

    shown = [name for name in tasks if name in figure.predictions]
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in ("image", *shown))
    above = "".join(f"<td>{picture(figure.predictions[name], f'{name}_prediction')}</td>" for name in shown)
    below = "".join(f"<td>{picture(figure.truths.get(name), f'{name}_truth')}</td>" for name in shown)
    bars = ""
    if figure.scales:
        cells = "".join(f"<td>{_bar(tasks[name], figure.scales.get(name))}</td>" for name in shown)
        bars = f'<tr><th scope="row"></th><td></td>{cells}</tr>\n'
    return (
        f'<figure><figcaption>{escape(figure.id)}</figcaption><div class="wide"><table class="pictures">\n'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>\n"
        f'<tr><th scope="row">prediction</th><td rowspan="2">{picture(figure.image, "image")}</td>{above}</tr>\n'
        f'<tr><th scope="row">truth</th>{below}</tr>\n{bars}</tbody></table></div></figure>\n'
    )


def _bar(task: Task, scale: tuple[float, float] | None) -> str:
    if scale is None:
        return ""
    alt = escape(f"{task.name}: colours {scale_text(task, scale)}")
    return f'<img class="bar" src="{png_uri(scale_bar(task, scale, SHOWN))}" alt="{alt}">'


_STYLE = Template("""body { font: 15px/1.5 system-ui, sans-serif; color: #1c1e21; background: #fff; }
body { max-width: 1500px; margin: 2rem auto; padding: 0 1.5rem; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; }
h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
p.protocol { color: #555; margin: 0 0 1rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; white-space: nowrap; }
thead th { border-bottom: 2px solid #888; }
th:first-child { text-align: left; font-weight: 500; }
dl { display: grid; grid-template-columns: max-content auto; gap: .1rem 1rem; color: #555; }
dd { margin: 0; overflow-wrap: anywhere; }
details { margin: .4rem 0; }
summary { cursor: pointer; }
.tables { display: flex; flex-wrap: wrap; gap: 1rem 3rem; align-items: start; padding: .5rem 1rem; font-size: .9rem; }
.legend p { margin: .4rem 0 0; font-weight: 500; }
.legend ul { list-style: none; display: flex; flex-wrap: wrap; gap: .1rem 1rem; margin: 0; padding: 0; font-size: .9rem; }
.legend i { display: inline-block; width: .8em; height: .8em; margin-right: .4em; border: 1px solid #888; }
figure { margin: 1.2rem 0; }
figcaption { font-weight: 500; }
table.pictures th, table.pictures td { border: 0; padding: .2rem .3rem; text-align: center; font-size: .85rem; }
table.pictures th[scope=row] { writing-mode: vertical-rl; rotate: 180deg; color: #555; }
img, .none { display: block; width: ${shown}px; height: auto; }
img.bar { width: auto; max-width: 100%; }
img.small { image-rendering: pixelated; }
.none { display: grid; place-items: center; color: #777; background: #f0f0f0; }
""").substitute(shown=SHOWN)
_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>$title</title>
<style>
$style</style>
</head>
<body>
<h1>$title</h1>
$body
</body>
</html>
""")
