"""An evaluation as people read it: lines for a terminal, and a folder with JSON, Markdown and one page that holds its pictures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path

from pamm.drawing.page import (
    MISSING,
    REPORT,
    Row,
    class_legends,
    decimals,
    escape,
    format_table,
    html_page,
    html_scores,
    markdown_table,
    metric_details,
    plain_markdown,
)
from pamm.evaluation.evaluate import SCALE, Evaluation
from pamm.evaluation.gain import Comparison
from pamm.evaluation.ranking import Ranked, Ranking
from pamm.evaluation.scores import Resolution
from pamm.files import replace_text
from pamm.tasks import TASKS, Task

RESULTS, PAGE = "results.json", "results.md"

HEADINGS: Mapping[Resolution, str] = {
    "frame": "In the padded frame, as the papers measure",
    "original": "At the images' own size",
}

SAME = "At the images' own size the numbers are the same: the frame holds every image unchanged."

Named = Sequence[tuple[str, Evaluation]]
"""Results by name: others to compare with first, the evaluation itself last."""

Comparisons = Mapping[Resolution, Comparison]


def format_evaluation(named: Named, tasks: Mapping[str, Task], comparisons: Comparisons) -> str:
    """Plain text: the table, the protocol and the gain at every resolution."""
    parts = []
    for resolution, rows, gains, protocol in _tables(named, comparisons):
        columns = _columns(comparisons.get(resolution), tasks)
        text = f"{format_table(rows, tasks, gains=gains, columns=columns)}\n{protocol}"
        if resolution in comparisons:
            text += f"\n{_gain_line(comparisons[resolution])}"
        parts.append(text)
    return "\n\n".join(parts) + (f"\n{SAME}" if _is_same(named[-1][1]) else "")


def write_evaluation_report(
    folder: str | Path,
    named: Named,
    tasks: Mapping[str, Task],
    *,
    comparisons: Comparisons | None = None,
    command: str = "",
) -> Path:
    """Write results.json, results.md and report.html into `folder`; returns the page's path.

    The page is one file without script and without anything from elsewhere: pictures are in it. It holds no date, so that the same
    results give the same bytes. Everything that comes from outside, ids of images above all, is escaped.
    """
    folder, comparisons = Path(folder), comparisons or {}
    folder.mkdir(parents=True, exist_ok=True)
    named[-1][1].save(folder / RESULTS)
    replace_text(folder / PAGE, _writable(_markdown(named, tasks, comparisons, command)))
    replace_text(folder / REPORT, _writable(_html(named, tasks, comparisons, command)))
    return folder / REPORT


# -- what both forms show ------------------------------------------------------------------------------------------------


def _tables(
    named: Named, comparisons: Comparisons
) -> list[tuple[Resolution, list[Row], list[float | None] | None, str]]:
    """Resolution, rows, their gains and the protocol: the frame's, and the images' own where that is another one."""
    last, tables = named[-1][1], []
    for resolution in last.rows:
        if resolution == "original" and _is_same(last):
            continue
        rows = [(name, result.rows[resolution]) for name, result in named]
        gains = None
        if resolution in comparisons:
            found = comparisons[resolution]
            scores = {task: {found.metrics[task]: value} for task, value in found.scores.items()}
            rows.insert(0, (found.baseline, scores))
            gains = [None] * (len(rows) - 1) + [found.mean]
        tables.append((resolution, rows, gains, last.protocol if resolution == "frame" else last.original.protocol))
    return tables


def _is_same(result: Evaluation) -> bool:
    """Whether both resolutions were measured and are the same one."""
    return len(result.rows) == 2 and result.original.resized == 0


def _columns(found: Comparison | None, tasks: Mapping[str, Task]) -> dict[str, list[str]]:
    """Task → the metrics its columns show, where a baseline is compared by another one than the task's score."""
    metrics = found.metrics if found else {}
    return {task: [tasks[task].score, m] for task, m in metrics.items() if task in tasks and m != tasks[task].score}


def _gain_line(found: Comparison) -> str:
    gains = ", ".join(f"{task} {gain:+.2f}" for task, gain in found.gains.items())
    lines = [f"Δ over {found.baseline}, %: {gains}; mean {found.mean:+.2f} (baseline: {found.source})"]
    others = [f"{task} by {metric}" for task, metric in found.metrics.items() if metric != TASKS[task].score]
    lines += [f"compared by what the baseline's paper measured: {', '.join(others)}"] if others else []
    lines += [f"not measured alike: {text}" for text in found.differences]
    absent = "; ".join(f"{task}: {reason}" for task, reason in found.left_out.items())
    return "\n".join([*lines, f"not compared: {absent}"] if absent else lines)


def _facts(result: Evaluation, command: str) -> dict[str, str]:
    facts = {key: str(value) for key, value in result.model.items()} | ({"command": command} if command else {})
    return facts | {"pamm": version("pamm")}


def _ranked_by(ranking: Ranking, task: Task) -> str:
    """What orders the images, with its unit."""
    unit = task.units.get(task.quick_score or task.score)
    return f"{ranking.score}, {unit}" if unit else ranking.score


def _number(value: float) -> str:
    return f"{value:.{decimals(value)}f}" if math.isfinite(value) else MISSING


def _writable(text: str) -> str:
    """Names of files that are no Unicode text stay readable."""
    return text.encode("utf-8", "backslashreplace").decode()


# -- Markdown ------------------------------------------------------------------------------------------------------------


def _markdown(named: Named, tasks: Mapping[str, Task], comparisons: Comparisons, command: str) -> str:
    name, result = named[-1]
    lines = [f"# Evaluation of {plain_markdown(name)}", ""]
    tables = _tables(named, comparisons)
    for resolution, rows, gains, protocol in tables:
        lines += [
            f"## {HEADINGS[resolution]}",
            "",
            plain_markdown(protocol),
            "",
            markdown_table(rows, tasks, gains=gains, columns=_columns(comparisons.get(resolution), tasks)),
        ]
        if resolution in comparisons:
            lines += [*map(plain_markdown, _gain_line(comparisons[resolution]).splitlines()), ""]
    lines += [SAME, ""] if _is_same(result) else []
    lines += [f"- {key}: {plain_markdown(value)}" for key, value in _facts(result, command).items()]
    lines += ["", "## All metrics", ""]
    for task in tasks:
        columns = [(resolution, rows[-1][1].get(task, {})) for resolution, rows, _, _ in tables]
        lines += [f"### {task}", "", _metrics_markdown(tasks[task], columns), ""]
    if result.rankings:
        lines += ["## Worst and best images", ""]
        for task, ranking in result.rankings.items():
            lines += [
                f"### {task}",
                "",
                f"By {plain_markdown(_ranked_by(ranking, tasks[task]))} of the image alone.",
                "",
                _images_markdown(ranking),
            ]
    return "\n".join(lines).rstrip() + "\n"


def _metrics_markdown(task: Task, columns: Sequence[tuple[str, Mapping[str, float]]]) -> str:
    keys = dict.fromkeys(key for _, values in columns for key in values)
    lines = ["| | " + " | ".join(name for name, _ in columns) + " |", "|---|" + "---:|" * len(columns)]
    for key in keys:
        cells = [_number(values[key]) if key in values else MISSING for _, values in columns]
        lines.append(f"| {plain_markdown(task.titled(key))} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _images_markdown(ranking: Ranking) -> str:
    lines = ["| worst | | best | |", "|---|---:|---|---:|"]
    for index in range(max(len(ranking.worst), len(ranking.best))):
        cells = []
        for images in (ranking.worst, ranking.best):
            one = images[index] if index < len(images) else None
            cells += [plain_markdown(one.id), _number(one.score)] if one else ["", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# -- the page ------------------------------------------------------------------------------------------------------------


def _html(named: Named, tasks: Mapping[str, Task], comparisons: Comparisons, command: str) -> str:
    name, result = named[-1]
    tables = _tables(named, comparisons)
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in _facts(result, command).items())
    summary = details = ""
    for resolution, rows, gains, protocol in tables:
        summary += f'<h2>{HEADINGS[resolution]}</h2><p class="protocol">{escape(protocol)}</p>'
        summary += html_scores(rows, tasks, gains, _columns(comparisons.get(resolution), tasks))
        if resolution in comparisons:
            summary += "".join(f"<p>{escape(line)}</p>" for line in _gain_line(comparisons[resolution]).splitlines())
        measured = rows[1:] if resolution in comparisons else rows
        details += f"<h3>{HEADINGS[resolution]}</h3>"
        details += "".join(metric_details(task, tasks[task], measured) for task in tasks)
    summary += f"<p>{SAME}</p>" if _is_same(result) else ""
    parts = [summary, f"<dl>{facts}</dl>", "<h2>All metrics</h2>", details, _gallery(result.rankings, tasks)]
    return html_page(f"Evaluation of {name}", parts, style=_STYLE)


def _gallery(rankings: Mapping[str, Ranking], tasks: Mapping[str, Task]) -> str:
    if not rankings:
        return ""
    note = (
        "Side by side: what the network saw, its prediction, the truth; pixels of the truth without a label are grey. Prediction "
        "and truth share the truth's range of colours, which a bar below them tells where it is not the same for all. The "
        "number is the score of the image alone, in the frame; it serves to order the images and is no part of the results."
    )
    text = f"<h2>Worst and best images</h2><p>{note}</p>{class_legends(tasks)}"
    for task, ranking in rankings.items():
        sides = ""
        for heading, images in (("worst first", ranking.worst), ("best first", ranking.best)):
            figures = "".join(map(_figure, images)) or "<p>none</p>"
            sides += f"<section><h4>{heading}</h4>{figures}</section>"
        text += (
            f'<h3>{escape(task)}, by {escape(_ranked_by(ranking, tasks[task]))}</h3><div class="ends">{sides}</div>\n'
        )
    return text


def _figure(one: Ranked) -> str:
    tags = {
        what: f'<img src="{escape(uri)}" alt="{escape(f"{one.id}: {what}")}">' for what, uri in one.pictures.items()
    }
    bar = tags.pop(SCALE, "")
    return (
        f"<figure><figcaption>{escape(one.id)} <b>{_number(one.score)}</b></figcaption>"
        f'<div class="row">{"".join(tags.values())}</div>{bar}</figure>\n'
    )


_STYLE = """h3 { font-size: 1.05rem; margin: 1.2rem 0 .3rem; }
h4 { font-size: .95rem; margin: .3rem 0; color: #555; }
figure { margin: .6rem 0; }
figcaption { overflow-wrap: anywhere; font-size: .9rem; }
.ends { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(560px, 100%), 1fr)); gap: 0 2rem; align-items: start; }
.row { display: flex; gap: .4rem; align-items: start; }
.row img { height: 150px; width: auto; max-width: 33%; object-fit: contain; }
"""
"""What this page adds to the style of all pages of results."""
