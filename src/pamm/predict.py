"""Any image in, maps at its size out; and the files of a whole batch of images."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from pamm.data.images import ImageError
from pamm.data.transforms import normalize
from pamm.inputs import ImageLike, PredictError, expand_inputs, file_names, to_array
from pamm.memory import keep_memory
from pamm.models.model import MultiTaskModel, resize_rows
from pamm.models.saved import load_model
from pamm.pictures import SheetRow, compose_sheet, contact_sheet, save_sheet, sheet_row
from pamm.precision import Precision, choose_precision, prepare
from pamm.tasks import Task

FORMATS = {"png": "{task}/{stem}.png", "npy": "arrays/{task}/{stem}.npy", "picture": "pictures/{task}/{stem}.png"}
"""Kind of output → its place in the output folder."""

SHEET = "contact_sheet.jpg"
SHEET_ROWS = 8
"""A contact sheet shows this many images at most, the first ones."""

STRIP_VALUES = 2**24
"""Values that are resized and decoded, or drawn, at once: what bounds the memory for a large image."""


class Maps(Mapping[str, np.ndarray]):
    """The predictions for one image: task name → array in the task's unit, at the image's size.

    semseg, human_parts: (H, W) uint8 class index. depth: (H, W) float32 metres. normals: (H, W, 3) float32 unit vectors.
    sal, edge: (H, W) float32 probability. `image` is the (H, W, 3) uint8 RGB they belong to, turned by its EXIF
    orientation; `name` is its file's stem, or "image".
    """

    def __init__(
        self,
        image: np.ndarray,
        maps: Mapping[str, np.ndarray],
        tasks: Mapping[str, Task],
        *,
        source: Path | None = None,
    ):
        self.image = image
        self.tasks = {name: tasks[name] for name in maps}
        self.source = source
        self.name = source.stem if source else "image"
        self._maps = dict(maps)

    def __getitem__(self, task: str) -> np.ndarray:
        if task not in self._maps:
            raise KeyError(f"no map '{task}'; the model predicts {', '.join(self._maps)}")
        return self._maps[task]

    def __iter__(self) -> Iterator[str]:
        return iter(self._maps)

    def __len__(self) -> int:
        return len(self._maps)

    def __repr__(self) -> str:
        height, width = self.image.shape[:2]
        return f"Maps({self.name!r}, {height}×{width}: {', '.join(self._maps)})"

    def draw(self, task: str, *, step: int = 1) -> np.ndarray:
        """The task's picture, (H, W, 3) uint8; with `step` of every step-th row and column only."""
        whole = self[task]
        values = whole[::step, ::step]
        rows = max(1, STRIP_VALUES // 8 // values.shape[1])
        strips = [values[top : top + rows] for top in range(0, len(values), rows)]
        return np.concatenate([self.tasks[task].draw(strip, reference=whole) for strip in strips])

    def save(
        self, folder: str | Path, *, stem: str | None = None, formats: Sequence[str] = tuple(FORMATS)
    ) -> list[Path]:
        """Write every map into `folder` and return the files.

        png: <folder>/<task>/<stem>.png, which the task reads back (the layout of a folder data set).
        npy: <folder>/arrays/<task>/<stem>.npy, the array as it is. picture: <folder>/pictures/<task>/<stem>.png.
        Files of an earlier prediction are replaced. Raises PredictError for no or an unknown format, where a file would
        replace the predicted image or the labels of a data set, and where nothing can be written.
        """
        folder, stem = Path(os.path.expanduser(folder)), self.name if stem is None else stem
        _check_formats(formats)
        _check_folder(folder, formats)
        if stem in ("", ".", "..") or "/" in stem or os.sep in stem:
            raise PredictError(f"stem is {stem!r}, expected a file name without folders and suffix")
        targets = [(f, task, folder / FORMATS[f].format(task=task, stem=stem)) for f in formats for task in self]
        self._protect(folder, [path for _, _, path in targets])
        for kind, task, path in targets:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._write(kind, task, path)
            except OSError as error:
                raise PredictError(
                    f"{path} cannot be written ({error.strerror or error}); choose another folder"
                ) from None
        return [path for _, _, path in targets]

    def _write(self, kind: str, task: str, path: Path) -> None:
        if kind == "png":
            self.tasks[task].save_png(self[task], path)
        elif kind == "npy":
            np.save(path, self[task])
        else:
            Image.fromarray(self.draw(task)).save(path)

    def _protect(self, folder: Path, targets: Iterable[Path]) -> None:
        """Raise PredictError where saving would replace the image itself."""
        if self.source is None or not os.path.exists(self.source):
            return
        if any(os.path.exists(path) and os.path.samefile(path, self.source) for path in targets):
            raise PredictError(
                f"saving into {folder} would replace the image {self.source} itself; choose another folder"
            )


class Predictor:
    """A network that takes any image.

    source: what `pamm.load_model` takes (run folder, saved model, hub repository), or a model. device: "auto" (a given
    model's own; else CUDA, Apple's MPS or the CPU, the first there is) or a torch device. longest_side: pixels to which
    an image's longer side is shrunk for the network, default the longer side of the size the network was built for.
    precision: "float32", which gives the checkpoint's own numbers, "bfloat16", or "auto": bfloat16 on a CPU with units for
    it. compile: run the network through torch.compile, which pays for many images of one size. A given model is not
    changed by either.

    An image is shrunk with antialiasing where its longer side exceeds `longest_side`, and never enlarged: a network
    learns the scale its images have. It is padded to multiples of the patch with the mean colour, itself in the centre;
    the logits are cropped, resized bilinearly to the image's own size and decoded there. Memory beside the maps does not
    grow with the image. Raises PredictError for a senseless argument, and what `load_model` raises.
    """

    def __init__(
        self,
        source: str | Path | MultiTaskModel,
        *,
        device: str | torch.device = "auto",
        longest_side: int | None = None,
        precision: Precision = "float32",
        compile: bool = False,
    ):
        if longest_side is not None and longest_side < 1:
            raise PredictError(f"longest_side is {longest_side}, expected a number of pixels, e.g. 512")
        given = isinstance(source, nn.Module)
        chosen = _choose_device(device, next(source.parameters()).device if given else None)
        if chosen.type == "cpu":
            keep_memory()
        lower = choose_precision(precision, chosen) != torch.float32
        model = load_model(source) if not given else copy.deepcopy(source) if lower or compile else source
        self.model = prepare(model.to(chosen), precision=precision, compile=compile)
        self.device = chosen
        self.longest_side = longest_side or max(self.model.image_size)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks the network predicts, in order."""
        return self.model.tasks

    def __call__(self, image: ImageLike) -> Maps:
        """One image → its maps. Raises ImageError for a file that is no image, PredictError for other senseless input.

        image: a path or an open file; a PIL image (its EXIF orientation is applied); an (H, W, 3) RGB or (H, W) grey array
        of uint8 or uint16 (0..65535); a (3, H, W) or (1, H, W) uint8 tensor.
        """
        pixels = to_array(image)
        source = Path(image) if isinstance(image, (str, os.PathLike)) else None
        return Maps(pixels, self._predict(pixels), self.tasks, source=source)

    def many(self, images: Iterable[ImageLike]) -> Iterator[Maps]:
        """The maps of one image after the other; an image is read when its maps are asked for."""
        return map(self, images)

    @torch.no_grad()
    def logits(self, pixels: np.ndarray) -> tuple[dict[str, Tensor], slice, slice]:
        """(H, W, 3) uint8 pixels → task → (1, channels, h, w) logits of the padded frame; the image's rows and columns in it."""
        shown = shrink(pixels, self.longest_side)
        frame, top, left = pad(normalize(shown.transpose(2, 0, 1))[None], self.model.backbone.patch)
        with _evaluating(self.model):
            logits = self.model(frame.to(self.device))
        return logits, slice(top, top + shown.shape[0]), slice(left, left + shown.shape[1])

    def _predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        logits, rows, columns = self.logits(pixels)
        size = pixels.shape[:2]
        return {name: decode(task, logits[name][..., rows, columns], size) for name, task in self.tasks.items()}


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """(H, W, 3) uint8 → its longer side at most `longest_side`, in proportion, antialiased; no side below 1 pixel."""
    height, width = pixels.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return pixels
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def pad(frame: Tensor, patch: int) -> tuple[Tensor, int, int]:
    """(1, 3, H, W) → zeros around it up to multiples of `patch`, and the row and column of its first pixel there."""
    height, width = frame.shape[-2:]
    top, left = -height % patch // 2, -width % patch // 2
    sides = (left, -width % patch - left, top, -height % patch - top)
    return F.pad(frame, sides), top, left


def decode(task: Task, logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(1, channels, h, w) logits → the prediction at `size`, in strips of rows, so that the resized logits stay small."""
    height, width = size
    rows = max(1, STRIP_VALUES // (logits.shape[1] * width))
    prediction: np.ndarray | None = None
    for top in range(0, height, rows):
        strip = resize_rows(logits, size, range(top, min(top + rows, height)))
        part = task.decode(strip)[0].cpu().numpy()
        if prediction is None:
            prediction = np.empty((height, *part.shape[1:]), part.dtype)
        prediction[top : top + rows] = part
    return prediction


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for the time of a prediction, so that a model can be looked at in the middle of its training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _choose_device(device: str | torch.device, own: torch.device | None) -> torch.device:
    if device == "auto":
        kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
        return own or torch.device(next(kind for kind, there in kinds.items() if there))
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        told = (str(error).splitlines() or ["no reason given"])[0]
        raise PredictError(f"device '{device}' cannot be used here ({told}); use --device auto or cpu") from None
    return chosen


def _check_folder(folder: Path, formats: Sequence[str]) -> None:
    """Raise PredictError where `folder` is no place for predictions."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise PredictError(f"{folder} is a file; give a folder for the predictions")
    if "png" in formats and os.path.isdir(folder / "images"):
        raise PredictError(
            f"{folder} holds images/ and is thus a split of a data set: predictions would replace its labels; choose "
            "another folder, or leave out the format png"
        )


def _check_sheet(out: Path, paths: Iterable[Path]) -> None:
    """Raise PredictError where the contact sheet would come among the images, or in place of one."""
    inside = next((path for path in paths if os.path.realpath(path.parent) == os.path.realpath(out)), None)
    if inside is not None:
        raise PredictError(
            f"{out} holds the image {inside.name}: the contact sheet {SHEET} would become one of the images there, or "
            "replace one; choose another folder for the predictions, or write no contact sheet (--no-sheet)"
        )


def _check_formats(formats: Sequence[str]) -> None:
    if not formats:
        raise PredictError(f"no format is given, so nothing would be written; choose some of: {', '.join(FORMATS)}")
    for kind in [formats] if isinstance(formats, str) else formats:
        if kind not in FORMATS or isinstance(formats, str):
            raise PredictError(f"found {formats!r} for the formats, expected a list of some of: {', '.join(FORMATS)}")


@dataclass
class Summary:
    """What became of a batch of images."""

    done: list[Path] = field(default_factory=list)
    failed: list[tuple[Path, str]] = field(default_factory=list)
    """Image and the reason why it has no maps; the contact sheet and the reason why it was not written."""
    sheet: Path | None = None
    """The contact sheet, if one was written."""


def predict_files(
    predictor: Predictor,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    formats: Sequence[str] = tuple(FORMATS),
    sheet: bool = True,
    progress: bool | None = None,
) -> Summary:
    """Predict every image into `out` (see `Maps.save`), going on after a bad one.

    Images of one stem keep apart by what differs in their paths. `sheet`: also <out>/contact_sheet.jpg, at most 300 kB,
    of the first 8 images. progress: None shows a bar on a terminal. Raises PredictError, before anything is predicted, for
    no or an unknown format, and for an `out` that is no folder or where files would replace labels or images; the failures
    of single images are in the summary.
    """
    paths, out = [Path(path) for path in paths], Path(os.path.expanduser(out))
    _check_formats(formats)
    _check_folder(out, formats)
    if sheet:
        _check_sheet(out, paths)
    summary, rows = Summary(), list[SheetRow]()
    hidden = None if progress is None else not progress
    for path, name in tqdm(list(zip(paths, file_names(paths), strict=True)), "predict", unit="image", disable=hidden):
        try:
            maps = predictor(path)
            maps.save(out, stem=name, formats=formats)
        except (ImageError, PredictError) as error:
            summary.failed.append((path, str(error)))
        except (MemoryError, RuntimeError) as error:
            if not _is_out_of_memory(error):
                raise
            summary.failed.append((path, "out of memory; shrink the image, or choose a smaller longest side"))
        else:
            summary.done.append(path)
            if sheet and len(rows) < SHEET_ROWS:
                rows.append(sheet_row(name, maps))
    if rows:
        _add_sheet(summary, rows, out / SHEET)
    return summary


def _add_sheet(summary: Summary, rows: Sequence[SheetRow], path: Path) -> None:
    try:
        summary.sheet = save_sheet(compose_sheet(rows), path)
    except OSError as error:
        reason = f"cannot be written ({error.strerror or error}); free the place or choose another folder"
        summary.failed.append((path, reason))


def _is_out_of_memory(error: Exception) -> bool:
    """Torch raises a plain RuntimeError where the CPU's memory does not suffice."""
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or any(
        words in str(error) for words in ("allocate memory", "not enough memory")
    )


__all__ = [
    "ImageLike",
    "Maps",
    "PredictError",
    "Predictor",
    "Summary",
    "contact_sheet",
    "expand_inputs",
    "predict_files",
]
