"""What the published implementations computed: weights by formula, their outputs, inner maps and gradients (README.md)."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import numpy as np
import torch

from golden import formula

FOLDER = Path(__file__).resolve().parent
POSITIONS = 2048
"""Values kept of a map, at most."""


def read_json(name: str) -> dict:
    return json.loads(gzip.decompress((FOLDER / f"{name}.json.gz").read_bytes()))


def manifest(name: str) -> dict:
    """Every key and shape of a real checkpoint, under "state", e.g. of `pamm_released_pascal_vitl`."""
    return read_json(f"{name}_keys")


class GoldenCase:
    """One published network with weights by formula.

    `facts` holds its sizes, `tasks`, `image` (H, W) and `grad_norm` {checkpoint key: norm, or None where no gradient flows}.
    """

    def __init__(self, name: str):
        self.facts = read_json(name)
        self.tasks: list[str] = self.facts["tasks"]
        self.image_size: tuple[int, int] = tuple(self.facts["image"])
        self.name: str = self.facts["name"]  # seeds the inputs
        self.state = self.tensors("state")
        self.extras = self.tensors("unregistered")  # what the checkpoint of the released PAMM does not hold
        with np.load(FOLDER / f"{name}.npz") as values:
            self.values = {key: values[key] for key in values.files}

    def tensors(self, kind: str) -> dict[str, torch.Tensor]:
        return {key: self.by_formula(formula.tensor, key, shape) for key, shape in self.facts.get(kind, {}).items()}

    @staticmethod
    def by_formula(function, name: str, shape) -> torch.Tensor:
        return torch.from_numpy(function(name, tuple(shape)))

    def image(self) -> torch.Tensor:
        """(2, 3, H, W) float32: what the network was given."""
        return self.by_formula(formula.image, self.name, (2, 3, *self.image_size))

    def features(self) -> list[torch.Tensor]:
        """(2, C, H, W) float32 of each stage: what a decoder without backbone was given."""
        height, width = self.image_size
        sizes = ((channels, height >> i + 2, width >> i + 2) for i, channels in enumerate(self.facts["channels"]))
        return [self.by_formula(formula.image, f"{self.name}/feature/{i}", (2, *size)) for i, size in enumerate(sizes)]

    def loss(self, outputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The scalar whose gradients' norms are `facts["grad_norm"]`."""
        weights = {t: self.by_formula(formula.image, f"{self.name}/weight/{t}", x.shape) for t, x in outputs.items()}
        return sum((x * weights[task]).mean() for task, x in outputs.items())

    def maps(self, *prefixes: str) -> list[str]:
        """Names of the published arrays, or of those that begin with one of the prefixes, e.g. "mid/"."""
        return [name for name in self.facts["maps"] if name.startswith(prefixes or "")]

    def deviation(self, name: str, value: torch.Tensor) -> float:
        """Largest difference from the published array at its stored positions, as a share of its largest magnitude.

        Where only a part of the values is stored, all of them count in a sum with random signs, divided by the square root
        of their number. A value of another shape is told by an error, an order that is not the published one by infinity.
        """
        kept = self.facts["maps"][name]
        found = value.detach().cpu().numpy()
        assert list(found.shape) == kept["shape"], f"{name}: found shape {found.shape}, published {kept['shape']}"
        found, expected, key = found.ravel(), self.values[name], f"{self.name}/{name}"
        at = formula.positions(key, found.size, POSITIONS)
        if expected.dtype.kind == "i":
            return 0.0 if np.array_equal(found[at], expected) else np.inf
        found = found.astype(np.float64)
        difference = np.abs(found[at] - expected).max()
        if found.size > len(at):
            total = formula.signs(key, found.size) @ found
            difference = np.maximum(difference, abs(total - kept["sum"]) / np.sqrt(found.size))
        return float(difference / kept["largest"])


def losses() -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Published losses and metrics by name, and the random maps they were computed on."""
    with np.load(FOLDER / "losses_metrics.npz") as stored:
        maps = {key: stored[key] for key in stored.files}
    for key in [key for key in maps if key.endswith("/logits")]:
        rows, columns = (formula.upsampling(*sizes) for sizes in zip(maps[key].shape[2:], (40, 56), strict=True))
        maps[key] = (rows @ maps[key].astype(np.float64) @ columns.T).astype(np.float32)
    return read_json("losses_metrics")["values"], {key: torch.from_numpy(value) for key, value in maps.items()}
