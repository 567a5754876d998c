"""Small data sets in the packaging of the published archives, with random values, around real photographs for PASCAL."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat

NOBODY = 65534
"""A user without rights."""


@contextmanager
def as_user(folder: Path) -> Iterator[None]:
    """Inside, this process owns the folder and has no more rights than any user, also where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    above = [path for path in folder.parents if path.is_relative_to(tempfile.gettempdir())]
    modes = {path: path.stat().st_mode for path in above}
    for path, mode in modes.items():
        path.chmod(mode | 0o111)
    for path in (folder, *folder.rglob("*")):
        os.chown(path, NOBODY, NOBODY, follow_symlinks=False)
    os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(0)
        for path, mode in modes.items():
            path.chmod(mode)


def write_png(path, values):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values)).save(path)
    return path


def write_ids(path, ids):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{image_id}\n" for image_id in ids))


def snapshot(root):
    """Every file with its size and time of change: what must be the same when something was only read."""
    found = {}
    for folder, _, names in os.walk(root):
        for name in names:
            stat = os.stat(os.path.join(folder, name))
            found[os.path.join(folder, name)] = (stat.st_size, stat.st_mtime_ns)
    return found


NYUD_SIZE = (85, 112)
"""A fifth of the published images' height and width."""


def make_nyud(root, ids=("0001", "0002", "0003")):
    """The NYUDv2 packaging, with random values."""
    random = np.random.default_rng(0)
    size = NYUD_SIZE
    for image_id in ids:
        write_png(root / "images" / f"{image_id}.png", random.integers(0, 256, (*size, 3), dtype=np.uint8))
        write_png(root / "segmentation" / f"{image_id}.png", random.integers(0, 41, size, dtype=np.uint8))
        write_png(root / "normals" / f"{image_id}.png", random.integers(0, 256, (*size, 3), dtype=np.uint8))
        write_png(root / "edge" / f"{image_id}.png", (random.random(size) < 0.1) * np.uint8(255))
        (root / "depth").mkdir(exist_ok=True)
        np.save(root / "depth" / f"{image_id}.npy", random.uniform(0.7, 9, size).astype(np.float32))
    write_ids(root / "gt_sets" / "train.txt", ids[:-1])
    write_ids(root / "gt_sets" / "val.txt", ids[-1:])


def make_pascal(root, parts, ids, size_of):
    """The PASCALContext packaging around real images and real PASCAL-Part annotations."""
    random = np.random.default_rng(0)
    for folder in ("JPEGImages", "human_parts"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "pascal-context" / "trainval").mkdir(parents=True)
    for image_id in ids:
        (root / "JPEGImages" / f"{image_id}.jpg").write_bytes((parts / f"{image_id}.jpg").read_bytes())
        (root / "human_parts" / f"{image_id}.mat").write_bytes((parts / f"{image_id}.mat").read_bytes())
        height, width = size_of(image_id)
        blocks = np.kron(random.integers(1, 460, (height // 40 + 1, width // 40 + 1)), np.ones((40, 40)))
        label_map = blocks[:height, :width].astype(np.uint16)
        savemat(root / "pascal-context" / "trainval" / f"{image_id}.mat", {"LabelMap": label_map})
        semseg = random.integers(0, 21, (height, width), dtype=np.uint8)
        semseg[:5] = 255
        write_png(root / "semseg" / "pascal-context" / f"{image_id}.png", semseg)
        saliency = random.integers(0, 256, (height, width), dtype=np.uint8)
        saliency[0, :2] = (127, 128)
        write_png(root / "sal_distill" / f"{image_id}.png", saliency)
        normals = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
        write_png(root / "normals_distill" / f"{image_id}.png", normals)
    write_ids(root / "ImageSets" / "Context" / "train.txt", ids[:-2])
    write_ids(root / "ImageSets" / "Context" / "val.txt", ids[-2:])


def make_cityscapes(root, size=(64, 128), cities=("aachen", "ulm"), images=2):
    """The three Cityscapes archives unpacked into one folder, `images` per city and split."""
    random = np.random.default_rng(0)
    for split in ("train", "val"):
        for city in cities:
            for number in range(images):
                image_id = f"{split}/{city}/{city}_{number:06d}_000019"
                write_png(
                    root / "leftImg8bit" / f"{image_id}_leftImg8bit.png", random.integers(0, 256, (*size, 3), np.uint8)
                )
                blocks = np.kron(random.integers(0, 34, (size[0] // 8, size[1] // 8)), np.ones((8, 8)))
                write_png(root / "gtFine" / f"{image_id}_gtFine_labelIds.png", blocks.astype(np.uint8))
                disparity = random.integers(2, 126 * 256, size).astype(np.uint16)
                disparity[:4] = 0
                write_png(root / "disparity" / f"{image_id}_disparity.png", disparity)
