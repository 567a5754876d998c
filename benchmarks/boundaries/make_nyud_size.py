"""Maps and truths of NYUD-v2's size (425×560, one annotator) from BSDS's: enlarged, mirrored, each annotator in turn.

    python benchmarks/boundaries/make_nyud_size.py HED_MAPS GROUND_TRUTH OUT COUNT

writes OUT/maps/<number>.png and OUT/truths/<number>.png. A map is enlarged smoothly and blurred, so that non-maximum
suppression has its usual work.
"""

import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from pamm.evaluation.boundaries.files import read_truths

SIZE = (425, 560)


def make(maps: Path, truths: Path, number: int) -> tuple[Image.Image, Image.Image]:
    """The map and the truth of one number: its image, its annotator and whether it is mirrored follow from it."""
    names = sorted(path.stem for path in maps.glob("*.png"))
    name, turn = names[number % len(names)], number // len(names)
    found = Image.open(maps / f"{name}.png")
    annotators = read_truths(truths / f"{name}.mat", outline=False)
    lines = annotators[turn % len(annotators)]
    if lines.shape[0] > lines.shape[1]:
        found, lines = found.transpose(Image.Transpose.TRANSPOSE), lines.T
    truth = Image.fromarray(lines * np.uint8(255)).resize(SIZE[::-1], Image.Resampling.NEAREST)
    found = found.resize(SIZE[::-1], Image.Resampling.BICUBIC).filter(ImageFilter.GaussianBlur(1))
    values = np.minimum(np.asarray(found, dtype=np.float64) * 2, 255).astype(np.uint8)
    step = -1 if turn % 2 else 1
    return Image.fromarray(values[:, ::step]), Image.fromarray(np.asarray(truth)[:, ::step])


if __name__ == "__main__":
    maps, truths, out = map(Path, sys.argv[1:4])
    for kind in ("maps", "truths"):
        (out / kind).mkdir(parents=True, exist_ok=True)
    for number in range(int(sys.argv[4])):
        for kind, picture in zip(("maps", "truths"), make(maps, truths, number), strict=True):
            picture.save(out / kind / f"{number:04d}.png")
