"""The Python blocks of docs/ run: those of a page one after another, on small files with the names that the page uses."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import golden
from look.looked_at import build
from pamm.cli import main

SMALLER = {"512, 512": "128, 128", "448, 576": "64, 96"}
"""Image sizes on the pages → sizes that are fast."""

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCKS = {
    page.name: blocks
    for page in sorted(DOCS.glob("*.md"))
    if page.name != "extending.md"  # see test_extending.py
    and (blocks := re.findall(r"^```python\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S))
}
LINKS = [
    pytest.param(page, link, id=f"{page.name}: {link}")
    for page in [*sorted(DOCS.glob("*.md")), DOCS.parent / "CONTRIBUTING.md", DOCS.parent / "SECURITY.md"]
    for link in sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8"))))
]


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """A working folder with a photograph."""
    monkeypatch.chdir(tmp_path)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save("photo.jpg")
    return tmp_path


def prepare_a_network(workplace: Path) -> dict:
    build("pamm").save_pretrained(workplace / "runs/pamm")
    (workplace / "runs/demo").symlink_to("pamm")
    (workplace / "photo.jpg").rename(workplace / "photograph.jpg")
    return {}


def prepare_boundaries(workplace: Path) -> dict:
    for kind in ("maps", "truths"):
        (workplace / kind).mkdir()
        Image.fromarray(np.eye(40, 50, dtype=np.uint8) * np.uint8(255)).save(workplace / kind / "100007.png")
    assert main(["boundary", "maps", "truths", "--protocol", "bsds", "--workers", "1", "--out", "scores.json"]) == 0
    counts = json.loads((workplace / "scores.json").read_text())["per_image"]["100007"]
    columns = [np.linspace(0.01, 0.99, 99), *(counts[name] for name in ("cntR", "sumR", "cntP", "sumP"))]
    np.savetxt(workplace / "100007_ev1.txt", np.column_stack(columns))
    return {}


def prepare_features(workplace: Path) -> dict:
    build("pamm").save_pretrained(workplace / "runs/pamm")
    return {}


def prepare_checkpoints(workplace: Path) -> dict:
    """A published checkpoint of PAMM as a file, and one of MTMamba as tensors, with the stage maps that it takes."""
    torch.save(golden.GoldenCase("pamm_released_pascal").state, workplace / "checkpoint.pth.tar40000")
    case = golden.GoldenCase("mtmamba_nyud")
    maps = [torch.randn(1, width, 64 // 4 >> i, 96 // 4 >> i) for i, width in enumerate(case.facts["channels"])]
    mlore = golden.GoldenCase("mlore_pascal").state
    return {"state": case.state, "mlore": mlore} | {f"f{i}": value for i, value in enumerate(maps, 1)}


PREPARE = {
    "boundaries.md": prepare_boundaries,
    "looking-inside.md": prepare_features,
    "official.md": prepare_checkpoints,
    "prediction.md": prepare_a_network,
}
"""Page → makes the files that its blocks read, and returns the names that its prose introduces."""


def test_every_page_with_python_is_prepared():
    assert BLOCKS.keys() == PREPARE.keys()


@pytest.mark.parametrize("page", BLOCKS)
def test_python_blocks_run(page, workplace):
    names = PREPARE[page](workplace)
    for block in BLOCKS[page]:
        for large, small in SMALLER.items():
            block = block.replace(large, small)
        exec(compile(block, page, "exec"), names)


@pytest.mark.parametrize(("page", "link"), LINKS)
def test_links_lead_to_files(page, link):
    assert (page.parent / link).exists()


def test_the_index_lists_every_page():
    index = (DOCS / "index.md").read_text(encoding="utf-8")
    assert all(f"]({page.name})" in index for page in DOCS.glob("*.md") if page.name != "index.md")
