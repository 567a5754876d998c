"""The predictions for one image, and their files."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
from PIL import Image

from pamm.files import replacing, shown
from pamm.prediction.inputs import PredictError
from pamm.tasks import Task

FORMATS = {"png": "{task}/{stem}.png", "npy": "arrays/{task}/{stem}.npy", "picture": "pictures/{task}/{stem}.png"}
"""Kind of output → its place in the output folder."""

DEFAULT_FORMATS = ("picture", "png")
"""Not npy: the arrays of a photograph of 12 megapixels take 300 MB."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors of writing that would also occur for the next file."""

STRIP_VALUES = 2**24
"""Number of values that are resized and decoded, or drawn, at once. It limits the memory for a large image."""


class FolderError(PredictError):
    """An output folder that takes no more files: the disk is full, or may not be written."""


class Maps(Mapping[str, np.ndarray]):
    """The predictions for one image, at the image's size: task name → array in the task's unit.

    | task | array |
    |---|---|
    | semseg, human_parts | (H, W) uint8 class index |
    | depth | (H, W) float32 metres (disparity: pixels) |
    | normals | (H, W, 3) float32 unit vectors |
    | sal, edge | (H, W) float32 probability, 0 to 1 |

    Attributes:
        name: the stem of the image's file, or "image".

    Args:
        image: (H, W, 3) uint8 RGB, turned by its EXIF orientation.
        maps: task name → array.
        tasks: task name → task.
        source: the image's file, if it has one.
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
        """Draw a task's map in colours.

        Args:
            task: name of the task.
            step: keep only every step-th row and column.

        Returns:
            (H, W, 3) uint8 RGB.
        """
        whole = self[task]
        values = whole[::step, ::step]
        rows = max(1, STRIP_VALUES // 8 // values.shape[1])
        strips = [values[top : top + rows] for top in range(0, len(values), rows)]
        return np.concatenate([self.tasks[task].draw(strip, reference=whole) for strip in strips])

    def save(
        self, folder: str | Path, *, stem: str | None = None, formats: Sequence[str] = DEFAULT_FORMATS
    ) -> list[Path]:
        """Write every map into a folder. A file is written completely or not at all; files of an earlier prediction are replaced.

        | format | file |
        |---|---|
        | "picture" | <folder>/pictures/<task>/<stem>.png, in colours |
        | "png" | <folder>/<task>/<stem>.png, a label of a folder data set; .npy if a PNG would round or cut the values |
        | "npy" | <folder>/arrays/<task>/<stem>.npy, the unchanged array |

        Args:
            folder: folder of the predictions; it is made if it does not exist.
            stem: name of the files without suffix; default `name`.
            formats: some of the formats above.

        Returns:
            The files.

        Raises:
            PredictError: no format or an unknown one; a file would replace the predicted image or a data set's label; a file
                cannot be written.
            FolderError: no file can be written into the folder.
        """
        folder, stem = Path(os.path.expanduser(folder)), self.name if stem is None else stem
        check_formats(formats)
        check_folder(folder, formats)
        if stem in ("", ".", "..") or "/" in stem or os.sep in stem:
            raise PredictError(f"stem is {stem!r}, expected a file name without folders and suffix")
        targets = [(f, task, folder / FORMATS[f].format(task=task, stem=stem)) for f in formats for task in self]
        self._protect(folder, [path for _, _, path in targets])
        written = []
        for kind, task, path in targets:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                written.append(self._write(kind, task, path))
            except OSError as error:
                raise write_error(path, error) from None
        return written

    def _write(self, kind: str, task: str, path: Path) -> Path:
        if kind == "png":
            return self._write_label(task, path)
        with replacing(path) as new, open(new, "wb") as file:
            if kind == "npy":
                np.save(file, self[task])
            else:
                Image.fromarray(self.draw(task)).save(file, format="PNG")
        return path

    def _write_label(self, task: str, path: Path) -> Path:
        """Write the label file and remove earlier ones of other suffixes: a data set has one file per stem."""
        suffix, content = self.tasks[task].label_file(self[task])
        written = path.with_name(path.name.removesuffix(path.suffix) + suffix)
        with replacing(written) as new:
            new.write_bytes(content)
        for other in self.tasks[task].suffixes:
            if other != suffix:
                path.with_name(path.name.removesuffix(path.suffix) + other).unlink(missing_ok=True)
        return written

    def _protect(self, folder: Path, targets: Iterable[Path]) -> None:
        """Raise PredictError where saving would replace the image itself."""
        if self.source is None or not os.path.exists(self.source):
            return
        if any(os.path.exists(path) and os.path.samefile(path, self.source) for path in targets):
            raise PredictError(
                f"saving into {folder} would replace the image {self.source} itself; choose another folder"
            )


def write_error(path: Path, error: OSError) -> PredictError:
    """The error for a file that could not be written: a FolderError where no other could be either."""
    told = f"{shown(path, 300)} cannot be written ({error.strerror or error})"
    if error.errno in FULL:
        return FolderError(f"{told}; free some space, or choose another folder")
    return PredictError(f"{told}; choose another folder")


def try_folder(folder: Path) -> None:
    """Write a file in the output folder, before time is spent; nothing of it is left. Raises PredictError where that fails."""
    made: list[Path] = []
    try:
        made = [place for place in (folder, *folder.parents) if not os.path.lexists(place)]
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / f".pamm-{os.getpid()}.probe", "wb", buffering=0) as probe:
            try:
                probe.write(bytes(4096))  # an empty file needs no space on a full disk
            finally:
                os.unlink(probe.name)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise PredictError(
            f"the output folder {shown(folder, 300)} cannot be written ({reason}); choose another one, or free space or "
            "permissions there"
        ) from None
    finally:
        for place in made:
            with suppress(OSError):
                place.rmdir()


def check_folder(folder: Path, formats: Sequence[str]) -> None:
    """Raise PredictError if predictions must not be written into `folder`."""
    if os.path.exists(folder) and not os.path.isdir(folder):
        raise PredictError(f"{folder} is a file; give a folder for the predictions")
    if "png" in formats and os.path.isdir(folder / "images"):
        raise PredictError(
            f"{folder} holds images/ and is thus a split of a data set: predictions would replace its labels; choose "
            "another folder, or leave out the format png"
        )


def check_formats(formats: Sequence[str]) -> None:
    """Check names of formats.

    Args:
        formats: some of `FORMATS`.

    Raises:
        PredictError: no format, or an unknown one.
    """
    if not formats:
        raise PredictError(f"no format is given, so nothing would be written; choose some of: {', '.join(FORMATS)}")
    for kind in [formats] if isinstance(formats, str) else formats:
        if kind not in FORMATS or isinstance(formats, str):
            found = repr(formats) if isinstance(formats, str) else f"'{shown(kind)}'"
            raise PredictError(f"found {found} for the formats, expected a list of some of: {', '.join(FORMATS)}")
