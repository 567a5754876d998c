"""Writes this folder's files from the full results of the published implementations.

python tests/golden/make.py FOLDER   where FOLDER holds <case>.json and <case>.npz with every array whole, as README.md tells
"""

import gzip
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from golden import FOLDER, POSITIONS, formula


def write_json(name: str, facts: dict) -> None:
    text = json.dumps(facts, separators=(",", ":"))
    (FOLDER / f"{name}.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def keep(name: str, array: np.ndarray) -> tuple[dict, np.ndarray]:
    """What is written of one array: its shape, largest magnitude and signed sum; its values at the seeded positions."""
    flat = array.ravel()
    facts = {"shape": list(array.shape)}
    if array.dtype.kind == "f":
        facts["largest"] = float(np.abs(flat).max())
        if flat.size > POSITIONS:
            facts["sum"] = float(formula.signs(name, flat.size) @ flat.astype(np.float64))
    elif flat.size > POSITIONS:
        raise ValueError(f"{name}: found {flat.size} integers; an order is compared whole, with at most {POSITIONS}")
    return facts, flat[formula.positions(name, flat.size, POSITIONS)]


def make_case(source: Path) -> None:
    facts = json.loads(source.with_suffix(".json").read_text())
    facts["grad_norm"] = {k: None if v is None else float(f"{v:.7g}") for k, v in facts["grad_norm"].items()}
    facts["maps"], values = {}, {}
    with np.load(source) as arrays:
        for name in arrays.files:
            if name == "input" or name.startswith("feature/"):
                seed = facts["name"] if name == "input" else f"{facts['name']}/{name}"
                if not np.array_equal(formula.image(seed, arrays[name].shape), arrays[name]):
                    raise ValueError(f"{source}: {name} is not what the formula gives")
            else:
                facts["maps"][name], values[name] = keep(f"{facts['name']}/{name}", arrays[name])
    write_json(source.stem, facts)
    np.savez_compressed(FOLDER / source.name, **values)


def make_losses(source: Path) -> None:
    """Logits are random maps of 5×7 enlarged to 40×56: the small ones are kept, they give the same ones but for rounding."""
    write_json(source.stem, json.loads(source.with_suffix(".json").read_text()))
    with np.load(source) as arrays:
        maps = {key: arrays[key] for key in arrays.files}
    rows, columns = formula.upsampling(5, 40), formula.upsampling(7, 56)
    for key in [key for key in maps if key.endswith("/logits")]:
        small = (np.linalg.pinv(rows) @ maps[key].astype(np.float64) @ np.linalg.pinv(columns).T).astype(np.float32)
        difference = np.abs(rows @ small.astype(np.float64) @ columns.T - maps[key]).max()
        if difference > 3e-7 * np.abs(maps[key]).max():
            raise ValueError(f"{source}: {key} is not an enlarged map of 5×7, it differs by {difference}")
        maps[key] = small
    np.savez_compressed(FOLDER / source.name, **maps)


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).glob("*.npz")):
        (make_losses if path.stem == "losses_metrics" else make_case)(path)
    for path in sorted(Path(sys.argv[1]).glob("*_keys.json")):
        write_json(path.stem, json.loads(path.read_text()))
