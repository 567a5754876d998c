"""The command line of `pamm look`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from pamm.command_line import add_device, add_kernels, add_root, add_tasks, at_least, split_names
from pamm.drawing.layout import TILE
from pamm.drawing.plots import check_plots, save_figure
from pamm.files import distinct_stems, replace_text, shown
from pamm.look import LookError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from pamm.look.subjects import Subject, Subjects
    from pamm.prediction import Maps, Predictor

SMALLEST_TILE, LARGEST_TILE = 60, 2000
FIGURE_IMAGES = 8
"""Images in one figure of predictions; more go into further figures."""

MOST_FEATURES = 32
"""Images whose features are held at once, up to some 150 MB each for the papers' networks."""


def main(arguments: list[str]) -> int:
    """Run `pamm look ARGUMENTS`. Raises LookError, CheckpointError, ConfigError, DataError, PredictError, ImageError."""
    args = arguments_parser().parse_args(arguments)
    if not SMALLEST_TILE <= args.tile <= LARGEST_TILE:
        raise LookError(f"--tile: found {args.tile}, expected {SMALLEST_TILE} to {LARGEST_TILE} pixels")
    args.out.mkdir(parents=True, exist_ok=True)
    written = VIEWS[args.view](args)
    print("written: " + ", ".join(shown(path, 300) for path in written))
    return 0


def arguments_parser() -> argparse.ArgumentParser:
    """Every view with its options."""
    top = argparse.ArgumentParser(
        prog="pamm look", description="Look inside: pictures, and their numbers beside them.", allow_abbrev=False
    )
    views = top.add_subparsers(dest="view", required=True, metavar="predictions | features | router | scans")
    predictions = _view(
        views, "predictions", "predictions of several models side by side, with the truth where there is one"
    )
    _model_options(predictions, "+", count=4)
    predictions.add_argument("--arrays", action="store_true", help="also every map as .npy, at its image's size")
    features = _view(views, "features", "principal components of each stage's and task's features, as colours")
    _model_options(features, "+", count=4)
    features.add_argument("--stages", nargs="+", metavar="STAGE", help="only these rows, e.g. 4 fused")
    features.add_argument(
        "--pca",
        choices=["per-task", "shared"],
        default="per-task",
        help="a PCA per stage and task, which shows each task's structure; or one per stage shared by its tasks, which "
        "shows where they differ",
    )
    _model_options(_view(views, "router", "mean expert weights per task and stage, for B and for C"), None, count=32)
    scans = _view(views, "scans", "scan orders as curves over the token grid")
    scans.add_argument(
        "--grid", type=int, nargs=2, default=(16, 16), metavar=("H", "W"), help="tokens (default: 16 16)"
    )
    scans.add_argument(
        "--curve",
        nargs="+",
        default=["hilbert", "snake", "morton"],
        help="hilbert, snake, morton, hilbert-bottom-left; snake-released, morton-released (of pamm-released, whose hilbert "
        "is the same); cross (MTMamba's)",
    )
    scans.add_argument(
        "--orders", type=at_least(1), default=4, help="orders of each curve (default: 4, as in the papers)"
    )
    return top


def _view(views: Any, name: str, text: str) -> argparse.ArgumentParser:
    view = views.add_parser(name, help=text, description=text, allow_abbrev=False)
    view.add_argument(
        "--out", type=Path, default=Path("look"), help="folder for the pictures and numbers (default: look)"
    )
    view.add_argument("--tile", type=int, default=TILE, help=f"longer side of a picture, pixels (default: {TILE})")
    return view


def _model_options(view: argparse.ArgumentParser, several: str | None, *, count: int) -> None:
    text = "run folder, saved model folder or hub repository"
    view.add_argument("source", nargs=several, metavar="MODEL", help=text + (", one or more" if several else ""))
    view.add_argument("--images", nargs="+", default=[], help="images, folders of images or globs")
    view.add_argument(
        "--data", help="recipe or experiment.yaml whose images are shown (default: the first model's own)"
    )
    add_root(view)
    view.add_argument("--split", default="val")
    view.add_argument("--ids", nargs="+", default=[], help="names of images of the data set")
    view.add_argument(
        "--count", type=at_least(1), default=count, help=f"images, spread over the split (default: {count})"
    )
    add_tasks(view)
    if several:
        view.add_argument("--names", nargs="+", default=[], help="names of the models in the picture")
    view.add_argument("--longest-side", type=at_least(1), help="shrink images to this longer side before the network")
    add_device(view)
    add_kernels(view)


def _open(args: argparse.Namespace) -> tuple[dict[str, Predictor], Subjects, list[str]]:
    """The models, the images, and the tasks to show."""
    from pamm.look.subjects import choose_tasks, open_models, subjects_for

    sources = args.source if isinstance(args.source, list) else [args.source]
    names = getattr(args, "names", [])
    models = open_models(sources, names=names, device=args.device, longest_side=args.longest_side, kernels=args.kernels)
    tasks = choose_tasks(models, split_names(args.tasks))
    subjects = subjects_for(
        {name: predictor.model for name, predictor in models.items()},
        sources,
        images=args.images,
        data=args.data,
        root=args.root,
        split=args.split,
        ids=args.ids,
        count=args.count,
    )
    return models, subjects, tasks


def look_at_predictions(args: argparse.Namespace) -> list[Path]:
    """One figure for every `FIGURE_IMAGES` images."""
    from pamm.look.predictions import compare

    models, subjects, tasks = _open(args)

    folders, stems = distinct_stems(models), distinct_stems(subjects.names)

    def save_arrays(subject: Subject, maps: Mapping[str, Maps]) -> None:
        for name, own in maps.items():
            own.save(args.out / folders[name], stem=stems[subject.name], formats=["npy"])

    written, keep = [], save_arrays if args.arrays else None
    for page, first in enumerate(range(0, len(subjects), FIGURE_IMAGES), start=1):
        numbers = range(first, min(first + FIGURE_IMAGES, len(subjects)))
        part = (subjects[number] for number in _progress(numbers, "predict"))
        picture = compare(models, part, tasks, tile=args.tile, keep=keep)
        written.append(_save(picture, args, "predictions" if page == 1 else f"predictions_{page}"))
    return [*written, _write(args, "predictions", _facts(args, models, subjects, tasks))]


def look_at_features(args: argparse.Namespace) -> list[Path]:
    """One figure per image, the components' values per image and model, and their shares of the variance."""
    from pamm.look.features import feature_figure, look_at_features

    models, subjects, tasks = _open(args)
    if len(subjects) > MOST_FEATURES:
        raise LookError(f"features of {len(subjects)} images do not fit into memory; give {MOST_FEATURES} at most")
    shown = list(subjects)
    images = [subject.image for subject in shown]
    rows = [stage if stage == "fused" else f"stage {stage}" for stage in args.stages] if args.stages else None
    looks = {
        name: look_at_features(predictor, _progress(images, name), sharing=args.pca, rows=rows)
        for name, predictor in models.items()
    }
    written, stems = [], distinct_stems(subjects.names)
    for number, subject in enumerate(shown):
        picture = feature_figure(looks, shown, number, tasks, sharing=args.pca, tile=args.tile)
        written.append(_save(picture, args, f"features_{stems[subject.name]}"))
        values = {
            f"{name}/{row}/{column}": look.components[row, column].project(m.values).astype(np.float32)
            for name, look in looks.items()
            for row, columns in look.maps[number].items()
            for column, m in columns.items()
        }
        written.append(args.out / f"features_{stems[subject.name]}.npz")
        np.savez(written[-1], **values)  # pyright: ignore[reportArgumentType] (no map is called allow_pickle)
    shares = {
        name: {f"{row}/{column}": own.shares.tolist() for (row, column), own in look.components.items()}
        for name, look in looks.items()
    }
    facts = _facts(args, models, subjects, tasks) | {"pca": args.pca, "variance": shares}
    return [*written, _write(args, "features", facts)]


def look_at_router(args: argparse.Namespace) -> list[Path]:
    """One figure, and every image's weights."""
    from pamm.look.router import router_figure, router_weights

    check_plots()
    models, subjects, tasks = _open(args)
    images = (subject.image for subject in _progress(subjects, "router"))
    weights = router_weights(next(iter(models.values())), images)
    arrays = {f"{name}/stage {stage + 1}": values for (name, stage), values in weights.weights.items()}
    arrays |= {f"{name}/stage {stage + 1}/own": values for (name, stage), values in weights.mix.items()}
    picture = _save(router_figure(weights, tasks=tasks, tile=args.tile), args, "router")
    np.savez(args.out / "router.npz", **arrays)  # pyright: ignore[reportArgumentType] (as above)
    facts = _facts(args, models, subjects, tasks) | {
        "rows": list(weights.tasks),
        "mean": {f"{name}/stage {stage + 1}": weights.mean(name, stage).tolist() for name, stage in weights.weights},
        "kept": {f"{name}/stage {stage + 1}": weights.kept(name, stage).tolist() for name, stage in weights.weights},
    }
    return [picture, args.out / "router.npz", _write(args, "router", facts)]


def look_at_scans(args: argparse.Namespace) -> list[Path]:
    """One figure, and the orders of each curve as .npy."""
    from pamm.look.scans import jumps, name_of, scan_figure

    check_plots()
    picture, orders = scan_figure(args.curve, tuple(args.grid), count=args.orders, tile=args.tile)
    written = [_save(picture, args, "scans")]
    for curve, lines in orders.items():
        written.append(args.out / f"scans_{curve}.npy")
        np.save(written[-1], lines)
    facts = {
        curve: {name_of(curve, k): {"jumps": jumps(order, args.grid[1])} for k, order in enumerate(lines)}
        for curve, lines in orders.items()
    }
    return [*written, _write(args, "scans", {"grid": list(args.grid), "orders": facts})]


VIEWS = {
    "predictions": look_at_predictions,
    "features": look_at_features,
    "router": look_at_router,
    "scans": look_at_scans,
}


def _facts(
    args: argparse.Namespace, models: Mapping[str, Predictor], subjects: Subjects, tasks: Sequence[str]
) -> dict[str, Any]:
    """The content of a figure."""
    sources = args.source if isinstance(args.source, list) else [args.source]
    return {
        "models": dict(zip(models, sources, strict=True)),
        "images": subjects.names,
        "tasks": list(tasks),
    }


def _progress(items: Iterable[Any], name: str) -> Iterable[Any]:
    """A progress bar, only on a terminal."""
    return tqdm(items, name, unit="image", leave=False, disable=None)


def _save(picture: Image.Image | Figure, args: argparse.Namespace, name: str) -> Path:
    path = args.out / f"{name}.png"
    if any(os.path.exists(path) and os.path.exists(image) and os.path.samefile(path, image) for image in _inputs(args)):
        raise LookError(
            f"{path} is one of the images looked at and would be replaced; choose another folder with --out"
        )
    if isinstance(picture, Image.Image):
        picture.save(path, optimize=True)
    else:
        save_figure(picture, path)
    return path


def _inputs(args: argparse.Namespace) -> list[Path]:
    if not getattr(args, "images", None):
        return []
    from pamm.prediction import expand_inputs

    return expand_inputs(args.images)


def _write(args: argparse.Namespace, name: str, facts: dict[str, Any]) -> Path:
    path = args.out / f"{name}.json"
    replace_text(path, json.dumps(facts, indent=1) + "\n")
    return path
