"""Router weights read out of a network against the papers' equations computed from its parameters."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from looked_at import EXPERTS, KINDS, TASKS, WITH_ROUTER, build, photo
from matplotlib.backends.backend_agg import FigureCanvasAgg
from torch import Tensor

from pamm.look import LookError
from pamm.look.readout import reading
from pamm.look.router import RouterWeights, router_figure, router_weights
from pamm.prediction import Predictor

IMAGES = [photo(64, 96, seed) for seed in range(3)]


def top(scores: Tensor) -> Tensor:
    """(E,) → the k largest, the others zero."""
    kept = torch.zeros_like(scores)
    best = scores.argsort(descending=True)[: EXPERTS.top_k]
    kept[best] = scores[best]
    return kept


def by_equations(router, task: int, x: Tensor) -> Tensor:
    """Eq. 11-13 for one task and one image, x (L, e): Linear₁ at every position, then pooled."""
    quarter = router.project.weight.shape[-1] // 2
    weight, bias = router.project.weight[task].T, router.project.bias[task, 0]
    f_r = torch.cat(
        [(x @ weight[:, :quarter] + bias[:quarter]).mean(0), x.mean(0) @ weight[:, quarter:] + bias[quarter:]]
    )
    return top(F.gelu(f_r @ router.logits.weight[task].T + router.logits.bias[task, 0]).softmax(0))


def released_by_hand(router, x: Tensor) -> tuple[Tensor, Tensor]:
    """The released router for one image, x (e, h, w), position by position."""
    hidden = [router.channel_out(router.channel(x[:, i, j])) for i in range(x.shape[1]) for j in range(x.shape[2])]
    places = [router.positions[i, j] * x[:, i, j] for i in range(x.shape[1]) for j in range(x.shape[2])]
    f_r = torch.cat([sum(hidden) / len(hidden), router.spatial(sum(places) + router.positions_bias)])
    scores = router.scores(f_r)
    return top(scores[: EXPERTS.count].softmax(0)), scores[-1]


@torch.no_grad()
def expected(kind: str, image: np.ndarray) -> tuple[dict, dict]:
    """(parameter, stage) → (T, E) weights and (T,) mixes, from the inputs of the blocks that hold the routers."""
    model, inputs, weights, mixes = build(kind), {}, {}, {}
    released = kind == "pamm-released"
    for s, stage in enumerate(model.decoder.stages if released else model.decoder.pame):
        for name in "BC":
            block = getattr(stage, name)
            if released or block.router is not None:
                block.register_forward_pre_hook(
                    lambda module, given, key=(name, s, block): inputs.update({key: given[0]})
                )
    Predictor(model).logits(image)
    for (name, s, block), x in inputs.items():
        if released:
            pairs = [released_by_hand(block.routers[task], x[t][0]) for t, task in enumerate(TASKS)]
            weights[name, s], mixes[name, s] = (torch.stack(part) for part in zip(*pairs, strict=True))
        else:
            weights[name, s] = torch.stack([by_equations(block.router, t, x[t, 0]) for t in range(len(TASKS))])
    return weights, mixes


@pytest.mark.parametrize("kind", WITH_ROUTER)
def test_weights_are_those_of_the_equations(kind):
    found = router_weights(Predictor(build(kind)), IMAGES)
    stages = 1 if kind == "one stage" else 2
    parameters = "C" if kind == "pamm, experts on C alone" else "BC"
    assert set(found.weights) == {(name, s) for name in parameters for s in range(stages)}
    for k, image in enumerate(IMAGES):
        weights, mixes = expected(kind, image)
        assert found.mix.keys() == mixes.keys()
        for place, values in weights.items():
            np.testing.assert_allclose(found.weights[place][k], values.numpy(), rtol=1e-4, atol=1e-6)
        for place, values in mixes.items():
            np.testing.assert_allclose(found.mix[place][k], values.numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", WITH_ROUTER)
def test_the_k_largest_are_kept_and_their_sum_stays_below_one(kind):
    found = router_weights(Predictor(build(kind)), IMAGES)
    for place, values in found.weights.items():
        assert values.shape == (3, len(TASKS), EXPERTS.count)
        assert ((values > 0).sum(-1) == EXPERTS.top_k).all()
        assert (values.sum(-1) < 1).all() and (values.sum(-1) >= EXPERTS.top_k / EXPERTS.count).all()
        np.testing.assert_allclose(found.mean(*place), sum(values) / 3, rtol=1e-6)
        np.testing.assert_allclose(found.kept(*place).sum(-1), EXPERTS.top_k)


@pytest.mark.parametrize("kind", KINDS)
def test_reading_changes_no_output_and_leaves_nothing_behind(kind):
    model, image = build(kind), torch.randn(2, 3, 64, 96)
    hooks = {id(module): len(module._forward_hooks) for module in model.modules()}
    with torch.no_grad():
        before = model(image)
        with reading(model) as seen:
            during = model(image)
        after = model(image)
    for task in TASKS:
        assert torch.equal(before[task], during[task]) and torch.equal(before[task], after[task])
    assert seen.fused and {id(module): len(module._forward_hooks) for module in model.modules()} == hooks


def test_reading_leaves_nothing_behind_after_an_error():
    model = build("pamm")
    with pytest.raises(RuntimeError, match="stop"), reading(model):
        raise RuntimeError("stop")
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("mtmamba", "mtmamba model has no router"),
        ("mtmamba++", r"mtmamba\+\+ model has no"),
        ("baseline", "without experts"),
    ],
)
def test_a_model_without_a_router_is_told_with_the_remedy(kind, reason):
    with pytest.raises(LookError, match=f"{reason}.*pamm look features MODEL"):
        router_weights(Predictor(build(kind)), IMAGES)


def test_heat_map_has_a_cell_per_task_and_expert():
    weights = np.array([[0.0, 0.25, 1.0], [0.5, 0.0, 0.25]])
    figure = router_figure(RouterWeights(("a", "b"), {("B", 0): weights[None]}, {}), tile=280)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels, axes = np.asarray(canvas.buffer_rgba())[::-1, :, :3].astype(int), figure.axes[0]
    corners = np.stack(np.meshgrid([-0.4, 0.6, 1.6], [-0.4, 0.6]), -1)  # of the cells, where no text stands
    columns, rows = axes.transData.transform(corners.reshape(-1, 2)).T.astype(int)
    cells = pixels[rows, columns].reshape(2, 3, 3)
    assert (cells[0, 0] == cells[1, 1]).all() and np.ptp(cells[0, 0]) == 0  # never kept: grey
    assert (cells[0, 1] == cells[1, 2]).all()
    light = cells.sum(-1)
    assert light[0, 2] < light[1, 0] < light[0, 1]  # the more, the darker
    assert {"25.0", "50.0", "100.0", "·", "125.0", "75.0"} == {text.get_text() for text in axes.texts}


def test_figure_holds_a_row_per_stage_and_a_column_per_parameter():
    def panels(*places, **options):
        weights = {place: np.full((2, 2, 15), 0.05) for place in places}
        figure = router_figure(RouterWeights(("a", "b"), weights, {}), tile=120, **options)
        names = [[label.get_text() for label in axes.get_yticklabels()] for axes in figure.axes[:-1]]
        return [(axes.get_title(), axes.get_ylabel()) for axes in figure.axes[:-1]], names

    assert panels(("B", 0), ("B", 1)) == ([("experts of B", "stage 1"), ("", "stage 2")], [["a", "b"]] * 2)
    assert panels(("B", 0), ("C", 0)) == ([("experts of B", "stage 1"), ("experts of C", "")], [["a", "b"]] * 2)
    assert panels(("B", 0), tasks=["b"])[1] == [["b"]]
