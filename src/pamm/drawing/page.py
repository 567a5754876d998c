"""The page of a training: its numbers, and its pictures beside their truths."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm.data.transforms import denormalize
from pamm.drawing.colours import colour_meanings, data_uri, draw_pair, scale_bar, scale_text
from pamm.drawing.render import render
from pamm.drawing.table import Row, metric_tables, score_table
from pamm.files import distinct_stem
from pamm.tasks import Task

REPORT = "report.html"
PICTURES = "pictures"
WIDTH = 190
"""Width of a picture on the page, CSS pixels (see page.css); smaller ones are enlarged with sharp pixels."""


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
    image: Tensor, labels: Mapping[str, Tensor], logits: Mapping[str, Tensor], tasks: Mapping[str, Task], image_id: str
) -> Figure:
    """Draw one sample: (3, H, W) normalised image, labels task → (c, H, W), logits task → (channels, H, W).

    Prediction and truth share the truth's colour scale, that of the prediction where there is no truth. Ignored pixels of a
    truth are grey; a label that is absent or ignored everywhere counts as none.
    """
    pairs = {name: draw_pair(task, logits[name], labels.get(name)) for name, task in tasks.items()}
    return Figure(
        image_id,
        denormalize(image),
        {name: pair.prediction for name, pair in pairs.items()},
        {name: pair.truth for name, pair in pairs.items() if pair.truth is not None},
        {name: pair.scale for name, pair in pairs.items() if pair.scale is not None},
    )


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

    Args:
        rows: results to compare, e.g. untrained and trained, with every metric of every task.
        protocol: split, size and treatment of the numbers, in words.
        extra: further facts, name → value.
        gains: see `score_table`.

    Everything given is escaped.
    """
    folder = Path(folder)
    (folder / PICTURES if figures else folder).mkdir(parents=True, exist_ok=True)
    taken: set[str] = set()
    page = render(
        REPORT,
        title=title,
        protocol=protocol,
        scores=score_table(rows, tasks, gains=gains),
        facts=extra or {},
        metrics=[(task, metric_tables(task, rows)) for task in tasks.values()],
        colours=colour_meanings(tasks),
        figures=[_saved(figure, tasks, folder, distinct_stem(figure.id, taken)) for figure in figures],
        width=WIDTH,
    )
    path = folder / REPORT
    path.write_text(page, encoding="utf-8")
    return path


def _saved(figure: Figure, tasks: Mapping[str, Task], folder: Path, stem: str) -> dict[str, Any]:
    """Write the pictures of a figure; returns what the template shows of them."""

    def save(pixels: np.ndarray | None, what: str) -> dict[str, Any] | None:
        if pixels is None:
            return None
        path = folder / PICTURES / f"{stem}_{what}.png"
        Image.fromarray(pixels).save(path)
        height, width = pixels.shape[:2]
        alt = f"{figure.id}: {what.replace('_', ' ')}"
        return {"source": quote(f"{PICTURES}/{path.name}"), "width": width, "height": height, "alt": alt}

    names = [name for name in tasks if name in figure.predictions]
    bars = {name: scale_bar(tasks[name], scale, WIDTH) for name, scale in figure.scales.items()}
    return {
        "id": figure.id,
        "image": save(figure.image, "image"),
        "predictions": {name: save(figure.predictions[name], f"{name}_prediction") for name in names},
        "truths": {name: save(figure.truths.get(name), f"{name}_truth") for name in names},
        "bars": {
            name: {"source": data_uri(bar), "alt": f"{name}: colours {scale_text(tasks[name], figure.scales[name])}"}
            for name, bar in bars.items()
        },
    }
