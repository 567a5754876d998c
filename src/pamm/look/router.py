"""The router's expert weights per task and stage, for B and for C (`pamm look router`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageDraw

from pamm.drawing.figure import INK, PALE, SOFT, TILE, Block, Scale, Tile, color_bar, compose, font, ramp
from pamm.look import LookError
from pamm.look.readout import PARAMETERS, plan_of, reading
from pamm.prediction import Predictor

OUTLIER = 4
"""A weight this many times the median makes the colours of a figure follow the square root, so that the others differ too."""


@dataclass(frozen=True)
class RouterWeights:
    """Expert weights of every image.

    weights: (parameter, stage from 0) → (images, T, E), zero where not among the top k, not renormalised. mix: likewise
    (images, T), the released PAMM's factor of a task's own expert; empty for the paper's PAMM.
    """

    tasks: tuple[str, ...]
    weights: Mapping[tuple[str, int], np.ndarray]
    mix: Mapping[tuple[str, int], np.ndarray]

    def mean(self, parameter: str, stage: int) -> np.ndarray:
        """(T, E), the mean over the images, those in which an expert is not kept counting as zero."""
        return self.weights[parameter, stage].mean(0)

    def kept(self, parameter: str, stage: int) -> np.ndarray:
        """(T, E), the share of images in which an expert is among the top k."""
        return (self.weights[parameter, stage] > 0).mean(0)


def router_weights(predictor: Predictor, images: Iterable[np.ndarray]) -> RouterWeights:
    """The weights of each (H, W, 3) uint8 image (paper eq. 11-13, without the noise of training).

    The released PAMM's spatial router sums over the positions before it scores the experts: it too gives one weight per
    image. Raises LookError for a model without a router.
    """
    model = predictor.model
    if not plan_of(model).routers:
        raise LookError(_without_router(predictor))
    found: dict[tuple[str, int], list[torch.Tensor]] = {}
    mixes: dict[tuple[str, int], list[torch.Tensor]] = {}
    with reading(model) as seen:
        for image in images:
            predictor.logits(image)
            for place, weights in seen.weights.items():
                found.setdefault(place, []).append(weights[:, 0].float().cpu())
            for place, mix in seen.mix.items():
                mixes.setdefault(place, []).append(mix[:, 0].float().cpu())
    stacked = ({place: torch.stack(parts).numpy() for place, parts in parts.items()} for parts in (found, mixes))
    return RouterWeights(tuple(model.tasks), *stacked)


def _without_router(predictor: Predictor) -> str:
    decoder = predictor.model.settings["model"]["decoder"]
    system = decoder.get("system", "pamm")
    reason = "has no router" if "experts" not in decoder else "was built without experts, so that nothing is routed"
    return (
        f"this {system} model {reason}; routers belong to PAMM with experts on B or C (decoder.experts). Its features can be "
        "seen: pamm look features MODEL"
    )


def draw_weights(
    weights: np.ndarray,
    tasks: Sequence[str],
    *,
    largest: float | None = None,
    power: float = 1.0,
    extra: Mapping[str, Sequence[str]] | None = None,
    tile: int = TILE,
) -> Image.Image:
    """(T, E) mean weights → a heat map, a row per task and a column per expert, each cell with its weight in percent.

    The colour follows (weight / largest)^power. largest: the weight of the darkest colour, default the largest here. An
    expert that is never kept has a grey cell with a dot. extra: name → (T,) texts behind each row.
    """
    scale = Scale(tile)
    high = max(float(weights.max()) if largest is None else largest, 1e-12)
    width, height, columns = round(tile / 7), round(tile / 8), dict(extra or {})
    left = max(scale.width(task) for task in tasks) + 3 * scale.gap
    spare = {name: max(map(scale.width, (name, *values))) + scale.gap for name, values in columns.items()}
    size = left + width * weights.shape[1] + sum(spare.values()), height * (len(tasks) + 1)
    picture = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(picture)
    colours = ramp((weights / high) ** power)
    for e in range(weights.shape[1]):
        pen.text((left + (e + 0.5) * width, height / 2), str(e + 1), SOFT, font=font(scale.small), anchor="mm")
    for t, task in enumerate(tasks):
        y = height * (t + 1)
        pen.text((left - scale.gap, y + height / 2), task, INK, font=font(scale.text), anchor="rm")
        for e, weight in enumerate(weights[t].tolist()):
            x = left + e * width
            fill, text, ink = _cell(weight, tuple(colours[t, e].tolist()))
            pen.rectangle((x, y, x + width - 2, y + height - 2), fill=fill)
            pen.text((x + width / 2 - 1, y + height / 2 - 1), text, ink, font=font(scale.small), anchor="mm")
    x = left + width * weights.shape[1]
    for name, values in columns.items():
        x += spare[name]
        pen.text((x, height / 2), name, SOFT, font=font(scale.small), anchor="rm")
        for t, value in enumerate(values):
            pen.text((x, height * (t + 1.5)), value, INK, font=font(scale.small), anchor="rm")
    return picture


def _cell(weight: float, colour: tuple[int, ...]) -> tuple[tuple[int, ...], str, tuple[int, ...]]:
    """Fill, text and colour of the text."""
    if weight == 0:
        return PALE, "·", SOFT
    light = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return colour, f"{100 * weight:.1f}", INK if light > 130 else (255, 255, 255)


def router_figure(weights: RouterWeights, *, tasks: Sequence[str] | None = None, tile: int = TILE) -> Image.Image:
    """A row per stage, a column for each of B and C, one colour scale for all."""
    chosen = list(weights.tasks if tasks is None else tasks)
    lines = [weights.tasks.index(task) for task in chosen]
    means = np.stack([weights.mean(*place)[lines] for place in weights.weights])
    largest = float(means.max())
    power = 0.5 if largest > OUTLIER * np.median(means[means > 0]) else 1.0
    rows: dict[str, dict[str, Tile]] = {}
    for stage in sorted({stage for _, stage in weights.weights}):
        for parameter in PARAMETERS:
            if (parameter, stage) in weights.weights:
                mean = weights.mean(parameter, stage)[lines]
                extra = {"sum": [f"{100 * total:.1f}" for total in mean.sum(1)]}
                if (parameter, stage) in weights.mix:
                    extra["own"] = [f"{m:+.2f}" for m in weights.mix[parameter, stage].mean(0)[lines]]
                panel = draw_weights(mean, chosen, largest=largest, power=power, extra=extra, tile=tile)
                rows.setdefault(f"stage {stage + 1}", {})[f"experts of {parameter}"] = Tile(panel)
    images = len(next(iter(weights.weights.values())))
    bar = color_bar(
        "mean weight, %",
        [(part, f"{100 * largest * part ** (1 / power):.1f}") for part in (0, 0.25, 0.5, 0.75, 1)],
        tile=tile,
    )
    caption = (
        f"Expert weights in percent, mean over {images} image{'' if images == 1 else 's'}; a dot: never among the top k. "
        "sum: softmax mass of the experts kept, which is not renormalised. "
    )
    if power < 1:
        caption += "Colours follow the square root. "
    if weights.mix:
        caption += "own: factor of the task's own expert, any number. "
    return compose([Block(rows)], caption=caption, bars=[bar], tile=tile)
