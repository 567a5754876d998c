"""Inputs of predictions: images in any form, files, folders and globs of images, and names for the files of their maps."""

from __future__ import annotations

import glob
import hashlib
import os
import stat
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pamm import PammError
from pamm.data import DataError
from pamm.data.listing import NO_FILE, conversion, is_skipped, kind_of, preview, visible
from pamm.files import shown
from pamm.images import IMAGE_SUFFIXES, ImageError, read_image, to_rgb

ImageLike = str | os.PathLike[str] | BinaryIO | Image.Image | np.ndarray | Tensor


LONGEST = 200
"""Bytes of a file's name without its suffix; file systems take 255 in all."""


class PredictError(PammError, ValueError):
    """An input or an output of a prediction that cannot be used; the message gives the cause and the remedy."""


def to_array(image: ImageLike) -> np.ndarray:
    """Convert any accepted image to an array.

    Args:
        image: as `Predictor` takes it.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        ImageError: the file cannot be read.
        PredictError: another object, or an array of another shape or dtype.
    """
    if isinstance(image, Image.Image):
        return _from_picture(image)
    if isinstance(image, Tensor):
        layout, kinds = "a (3, H, W) or (1, H, W) uint8 tensor", (torch.uint8,)
        array = image.detach().cpu().movedim(0, -1) if image.ndim == 3 else image
    elif isinstance(image, np.ndarray):
        layout, kinds = "an (H, W, 3) RGB or (H, W) grey array of uint8 or uint16", (np.uint8, np.uint16)
        array = image[..., None] if image.ndim == 2 else image
    elif isinstance(image, (str, os.PathLike)) or hasattr(image, "read"):
        return read_image(image)
    else:
        raise PredictError(f"found {type(image).__name__}, expected a path, a PIL image, an array or a tensor")
    if array.ndim != 3 or array.shape[2] not in (1, 3) or 0 in array.shape or array.dtype not in kinds:
        raise PredictError(
            f"found {image.dtype} values of shape {tuple(image.shape)}, expected {layout}. Multiply values in 0..1 by 255 "
            "and convert them to uint8; drop an alpha channel"
        )
    array = np.asarray(array)
    if array.dtype == np.uint16:
        array = ((array.astype(np.uint32) + 128) // 257).astype(np.uint8)
    return np.ascontiguousarray(np.broadcast_to(array, (*array.shape[:2], 3)))


def _from_picture(picture: Image.Image) -> np.ndarray:
    if 0 in picture.size:
        raise PredictError(
            f"found a PIL image of {picture.height} x {picture.width} pixels, expected at least one pixel"
        )
    try:
        return to_rgb(picture, "the image")
    except ImageError:
        raise
    except Exception as error:  # Pillow decodes only now, and its decoders raise many kinds
        raise ImageError(f"the image cannot be decoded ({error}); its file is damaged") from None


@dataclass
class Inputs:
    """The files that files, folders and globs mean, each once, in the order given."""

    images: list[Path] = field(default_factory=list)
    unread: list[Path] = field(default_factory=list)
    """Files that may be pictures, of suffixes that are not read."""
    folders: list[Path] = field(default_factory=list)
    """Subfolders of the given folders; their files are not read."""
    companions: list[Path] = field(default_factory=list)
    """Files that are no pictures: notes, films."""

    def failures(self) -> list[tuple[Path, str]]:
        """The unread files, each with the reason and the remedy."""
        return [(path, _unread_remedy(path)) for path in self.unread]

    def notes(self) -> list[str]:
        """The other files that were skipped, in words."""
        inside = f"folders, in which nothing is read (write '{self.folders[0]}/*.jpg')" if self.folders else ""
        passed_over = ((self.folders, inside), (self.companions, "files that are no pictures"))
        return [f"passed over {what}: {preview(map(str, paths))}" for paths, what in passed_over if paths]


def list_inputs(patterns: Sequence[str | Path]) -> Inputs:
    """Find the images that files, folders and globs mean.

    - A folder means the images directly in it, sorted. "photos/**/*.jpg" includes subfolders.
    - Of a glob's files, only those with an image's suffix are taken. A file given by its name may have any suffix.
    - Hidden files are not listed.

    Args:
        patterns: files, folders and globs.

    Returns:
        Each image once, in the order given, and the other files that were found.

    Raises:
        PredictError: a pattern matches no image.
    """
    found = [_expand(os.path.expanduser(pattern)) for pattern in patterns]
    taken: set[str] = set()
    merged = Inputs()
    for kind in fields(Inputs):  # the images first: a file that one pattern reads is not unread for another
        for path in (path for inputs in found for path in getattr(inputs, kind.name)):
            if (key := os.path.realpath(path)) not in taken:
                taken.add(key)
                getattr(merged, kind.name).append(path)
    return merged


def expand_inputs(patterns: Sequence[str | Path]) -> list[Path]:
    """The images of `list_inputs`.

    Args:
        patterns: files, folders and globs.

    Returns:
        Paths of the images.

    Raises:
        PredictError: a pattern matches no image.
    """
    return list_inputs(patterns).images


def _expand(pattern: str) -> Inputs:
    path = Path(pattern)
    try:
        kind = os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError, ValueError):
        kind = 0
    except OSError as error:
        if isinstance(error, PermissionError) or not glob.has_magic(str(pattern)):
            raise _unreadable(path, error) from None
        kind = 0
    if stat.S_ISREG(kind):
        return Inputs([path])
    is_folder = stat.S_ISDIR(kind)
    try:
        inputs = _in_folder(path) if is_folder else _in_glob(pattern)
    except OSError as error:
        raise _unreadable(path, error) from None
    except DataError as error:
        raise PredictError(str(error)) from None
    if inputs.images:
        return inputs
    known = ", ".join(IMAGE_SUFFIXES)
    instead = f"; it holds {preview(p.name for p in inputs.unread)}" if inputs.unread else ""
    if is_folder:
        raise PredictError(
            f"no image in the folder {path} ({known}){instead}; for its subfolders write '{path}/**/*.jpg'"
        )
    if glob.has_magic(pattern):
        _check_searchable(path)
        raise PredictError(
            f"no image ({known}) matches '{pattern}'{instead}; correct the pattern, or give a file or a folder"
        )
    raise PredictError(f"no file, folder or glob '{pattern}'; give images, folders of images, or e.g. 'photos/*.jpg'")


def _in_folder(folder: Path) -> Inputs:
    return _by_kind((folder / entry.name, kind_of(entry.name, entry, IMAGE_SUFFIXES)) for entry in visible(folder))


def _in_glob(pattern: str) -> Inputs:
    paths = [path for path in map(Path, sorted(glob.iglob(pattern, recursive=True))) if not is_skipped(path.name)]
    inputs = _by_kind((path, kind_of(path.name, path, IMAGE_SUFFIXES)) for path in paths)
    return replace(inputs, folders=[])  # a glob matches folders on its way


def _by_kind(kinds: Iterable[tuple[Path, str]]) -> Inputs:
    inputs = Inputs()
    places = {"read": inputs.images, "unread": inputs.unread, "folder": inputs.folders, "companion": inputs.companions}
    for path, kind in kinds:
        places[kind].append(path)
    return inputs


def _unread_remedy(path: Path) -> str:
    if not path.suffix:
        return "its name does not end as an image's (.jpg, ...); rename it, or give it by its name"
    if path.suffix.lower() in IMAGE_SUFFIXES:
        return f"it has the name of an image, {NO_FILE}; give a picture file"
    return f"files ending in {shown(path.suffix)} are not read; {conversion([path.name])}"


def _check_searchable(pattern: Path) -> None:
    """Raise PredictError where the folder in which a glob starts may not be read, which the search itself passes over."""
    start = next(folder for folder in pattern.parents if not glob.has_magic(str(folder)))
    try:
        os.listdir(start)
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise _unreadable(start, error) from None


def _unreadable(path: Path, error: OSError) -> PredictError:
    if isinstance(error, PermissionError):
        return PredictError(f"{path} may not be read: change its permissions, or those of the folders it lies in")
    return PredictError(f"{path} cannot be read ({error.strerror or error}); give the path of an image or a folder")


def file_names(paths: Sequence[Path]) -> list[str]:
    """Give each path a different name.

    A name is the stem. If stems are equal, the suffix and the folders that differ are added. Names that differ only in case
    count as equal, since some file systems do not distinguish them. A name that is too long is cut, and a digest keeps it
    unique.

    Args:
        paths: the images.

    Returns:
        One name for each path, without suffix.
    """
    whole = list(dict.fromkeys(path.absolute() for path in paths))
    same = _repeated((path.parent, path.stem) for path in whole)
    short = [f"{p.stem}_{p.suffix[1:]}" if i in same else p.stem for i, p in enumerate(whole)]
    names = short
    for depth in range(1, max((len(path.parts) for path in whole), default=1) - 1):
        same = _repeated(names)
        names = ["_".join((*p.parts[1:-1][-depth:], short[i])) if i in same else names[i] for i, p in enumerate(whole)]
    same = _repeated(names)
    name_of = {path: _fitting(short[i] if i in same else names[i]) for i, path in enumerate(whole)}
    taken: dict[str, str] = {}
    for path in paths:
        name = name_of[path.absolute()]
        name = next(n for k in count(1) if (n := name if k == 1 else f"{name}_{k}").casefold() not in taken)
        taken[name.casefold()] = name
    return list(taken.values())


def _fitting(name: str) -> str:
    """A name of at most LONGEST bytes."""
    if len(os.fsencode(name)) <= LONGEST:
        return name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:8]
    while len(os.fsencode(name)) > LONGEST - len(digest) - 1:
        name = name[:-1]
    return f"{name}_{digest}"


def _repeated(keys: Iterable[Any]) -> set[int]:
    """Indices of the keys that occur more than once, letter case apart."""
    places: dict[str, list[int]] = {}
    for i, key in enumerate(keys):
        places.setdefault(str(key).casefold(), []).append(i)
    return {i for group in places.values() if len(group) > 1 for i in group}
