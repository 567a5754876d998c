"""The router's expert weights per task and stage, for B and for C (`pamm look router`)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from pamm.drawing.layout import TILE
from pamm.drawing.plots import new_figure, points, set_caption
from pamm.look import LookError
from pamm.look.readout import PARAMETERS, plan_of, reading
from pamm.prediction import Predictor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure

OUTLIER = 4
"""A weight this many times the median makes the colours of a figure follow the square root, so that the others differ too."""


@dataclass(frozen=True)
class RouterWeights:
    """Expert weights of every image.

    Args:
        tasks: names of the T tasks.
        weights: (parameter, stage from 0) → (images, T, E), zero for experts outside the top k, not renormalised.
        mix: (parameter, stage from 0) → (images, T), the factor of a task's own expert in the released PAMM; empty for the
            paper's PAMM.
    """

    tasks: tuple[str, ...]
    weights: Mapping[tuple[str, int], np.ndarray]
    mix: Mapping[tuple[str, int], np.ndarray]

    def mean(self, parameter: str, stage: int) -> np.ndarray:
        """Mean weight of each expert over the images. An expert outside the top k counts as zero.

        Args:
            parameter: "B" or "C".
            stage: from 0.

        Returns:
            (T, E).
        """
        return self.weights[parameter, stage].mean(0)

    def kept(self, parameter: str, stage: int) -> np.ndarray:
        """Share of images in which an expert is among the top k.

        Args:
            parameter: "B" or "C".
            stage: from 0.

        Returns:
            (T, E), 0 to 1.
        """
        return (self.weights[parameter, stage] > 0).mean(0)


def router_weights(predictor: Predictor, images: Iterable[np.ndarray]) -> RouterWeights:
    """Expert weights of images, without the noise of training (paper eq. 11-13).

    The spatial router of the released PAMM sums over the positions before it scores the experts. It therefore also gives one
    weight per image.

    Args:
        predictor: the network.
        images: (H, W, 3) uint8 RGB images.

    Returns:
        The weights.

    Raises:
        LookError: the network has no router.
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
    axes: Axes,
    weights: np.ndarray,
    tasks: Sequence[str],
    norm: Normalize,
    *,
    extra: Mapping[str, Sequence[str]],
    text: float,
) -> ScalarMappable:
    """(T, E) mean weights as a heat map, a row per task and a column per expert, each cell with its weight in percent.

    Cells lie at whole x and y from 0. An expert that is never kept has a grey cell with a dot. Returns what a colour bar needs.

    Args:
        norm: weight → place in the colour map.
        extra: heading → (T,) texts behind each row.
        text: size of the letters, points.
    """
    from matplotlib import colormaps

    colours = colormaps["Blues"].with_extremes(bad="#eeeeee")
    edges = [np.arange(side + 1) - 0.5 for side in weights.shape[::-1]]
    cells = axes.pcolormesh(
        *edges, np.ma.masked_equal(weights, 0), cmap=colours, norm=norm, edgecolors="white", linewidth=1
    )
    axes.set_yticks(range(len(tasks)), tasks, fontsize=text)
    behind = weights.shape[1] + 0.4 + 1.5 * np.arange(len(extra))
    headings = [*(str(e + 1) for e in range(weights.shape[1])), *extra]
    axes.set_xticks([*range(weights.shape[1]), *behind], headings, fontsize=0.8 * text, color="dimgrey")
    axes.set(xlim=(-0.5, weights.shape[1] - 0.5 + 1.6 * len(extra)), ylim=(len(tasks) - 0.5, -0.5), aspect=0.9)
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    axes.spines[:].set_visible(False)
    centred = {"ha": "center", "va": "center", "fontsize": 0.8 * text}
    for (t, e), weight in np.ndenumerate(weights):
        ink = "dimgrey" if weight == 0 else "white" if norm(weight) > 0.6 else "black"
        axes.text(e, t, f"{100 * weight:.1f}" if weight else "·", color=ink, **centred)
    for x, values in zip(behind, extra.values(), strict=True):
        for t, value in enumerate(values):
            axes.text(x, t, value, **centred)
    return cells


def router_figure(weights: RouterWeights, *, tasks: Sequence[str] | None = None, tile: int = TILE) -> Figure:
    """A row per stage, a column for each of B and C, one colour scale for all. Raises PlotError without matplotlib."""
    chosen = list(weights.tasks if tasks is None else tasks)
    lines = [weights.tasks.index(task) for task in chosen]
    means = {place: weights.mean(*place)[lines] for place in weights.weights}
    values = np.stack(list(means.values()))
    uneven = values.max() > OUTLIER * np.median(values[values > 0])
    stages = sorted({stage for _, stage in means})
    parameters = [name for name in PARAMETERS if any(name == own for own, _ in means)]
    letter, cell = max(9, tile / 17), max(22, tile / 7)
    size = len(parameters) * (values.shape[-1] + 7) * cell, len(stages) * (0.9 * len(chosen) + 0.7) * cell
    figure = new_figure(size[0], size[1] + 10 * letter)
    from matplotlib.colors import PowerNorm

    norm, text = PowerNorm(0.5 if uneven else 1, 0, max(float(values.max()), 1e-12)), points(letter)
    panels = figure.subplots(len(stages), len(parameters), squeeze=False)
    for row, stage in zip(panels, stages, strict=True):
        row[0].set_ylabel(f"stage {stage + 1}", fontsize=text)
        for axes, parameter in zip(row, parameters, strict=True):
            if (parameter, stage) not in means:
                axes.set_axis_off()
                continue
            mean = means[parameter, stage]
            extra = {"sum": [f"{100 * total:.1f}" for total in mean.sum(1)]}
            if (parameter, stage) in weights.mix:
                extra["own"] = [f"{m:+.2f}" for m in weights.mix[parameter, stage].mean(0)[lines]]
            cells = draw_weights(axes, mean, chosen, norm, extra=extra, text=text)
    for axes, parameter in zip(panels[0], parameters, strict=True):
        axes.set_title(f"experts of {parameter}", fontsize=text)
    bar = figure.colorbar(
        cells, ax=panels, location="bottom", shrink=0.4, aspect=30, format=lambda w, _: f"{100 * w:.1f}"
    )
    bar.set_label("mean weight, %", fontsize=text)
    bar.ax.tick_params(labelsize=0.8 * text)
    images = len(next(iter(weights.weights.values())))
    caption = (
        f"Expert weights in percent, mean over {images} image{'' if images == 1 else 's'}; a dot: never among the top k. "
        "sum: softmax mass of the experts kept, which is not renormalised. "
    )
    if uneven:
        caption += "Colours follow the square root. "
    if weights.mix:
        caption += "own: factor of the task's own expert, any number. "
    set_caption(figure, caption, max(9, tile / 20))
    return figure
