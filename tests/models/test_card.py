"""The model card: what stands beside saved weights is true of them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard

from pamm.models.registry import build_model
from pamm.models.saved import load_model
from pamm.tasks import TASKS, create_task
from pamm.training.run import train
from tiny import MODEL, experiment


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A finished run of the tiny network."""
    folder = tmp_path_factory.mktemp("card")
    train(experiment(str(folder / "secret-rooms"), steps=2), folder / "run", progress=False)
    return folder / "run"


def build(**options: dict) -> object:
    tasks = {name: create_task(name, **given) for name, given in options.items()}
    return build_model(MODEL, tasks, (48, 64))


def card(folder: Path) -> str:
    return (folder / "README.md").read_text(encoding="utf-8")


def test_a_model_of_unknown_origin_says_so(tmp_path):
    build(semseg={"classes": ["sky", "a|b <i>", "tree"]}, depth={}).save_pretrained(tmp_path)
    text = card(tmp_path)
    for claim in ("More Information Needed", "pushed", "PytorchModelHubMixin", "trained on"):
        assert claim not in text
    assert "not recorded beside them" in text and "No scores of these weights" in text
    assert "No licence was stated for these weights" in text
    assert "| 3: sky, a\\|b \\<i\\>, tree |" in text and "metres" in text
    data = ModelCard.load(tmp_path / "README.md").data
    assert data.library_name == "pamm" and data.license is None


def test_a_run_tells_its_data_settings_and_scores(run, tmp_path):
    load_model(run).save_pretrained(tmp_path / "m", model_card_kwargs={"license": "mit"})
    text = card(tmp_path / "m")
    assert "experiment: tiny" in text and "data: synthetic" in text and "2 steps of 4 images, adam" in text
    results = json.loads((run / "results.json").read_text())
    for name, metrics in results["results"].items():
        task = load_model(run).tasks[name]
        known = [line for line in text.splitlines() if line.startswith(f"| {name} | {task.titled(task.score)}")]
        value = metrics[task.score]
        assert len(known) == 1 and known[0].endswith(f"| {'–' if value is None else f'{value:.4g}'} |")
    assert results["protocol"] in text and "The weights: mit" in text
    assert ModelCard.load(tmp_path / "m/README.md").data.license == "mit"
    assert "secret-rooms" not in text and str(run.parent) not in text  # folders of somebody's machine


@pytest.mark.parametrize("part", ["best", "last"])
def test_cards_inside_a_run_claim_no_scores(run, part):
    text = card(run / part)
    assert "experiment: tiny" in text and "No scores of these weights" in text


def test_weights_that_were_changed_carry_neither_training_nor_scores(run, tmp_path):
    model = load_model(run)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    model.save_pretrained(tmp_path)
    assert "not recorded beside them" in card(tmp_path) and "No scores of these weights" in card(tmp_path)
    model = load_model(run).half()
    model.save_pretrained(tmp_path / "half")
    assert "No scores of these weights" in card(tmp_path / "half")


def test_results_older_than_the_weights_are_not_theirs(run, tmp_path):
    stamp = (run / "best/model.safetensors").stat()
    old = (run / "results.json").stat()
    os.utime(run / "results.json", ns=(stamp.st_mtime_ns - 1, stamp.st_mtime_ns - 1))
    load_model(run).save_pretrained(tmp_path)
    os.utime(run / "results.json", ns=(old.st_atime_ns, old.st_mtime_ns))
    assert "No scores of these weights" in card(tmp_path) and "experiment: tiny" in card(tmp_path)


@pytest.mark.parametrize(
    "content", ["", "[]", '{"results": 3, "model": {"weights": "best"}}', '{"results": {}}', "[" * 9999]
)
def test_damaged_results_are_none(run, tmp_path, content):
    kept = (run / "results.json").read_text()
    try:
        (run / "results.json").write_text(content)
        load_model(run).save_pretrained(tmp_path)
    finally:
        (run / "results.json").write_text(kept)
    assert "No scores of these weights" in card(tmp_path)


def test_a_card_is_replaced_with_its_model_and_a_persons_own_is_kept(tmp_path):
    build(depth={}).save_pretrained(tmp_path)
    build(sal={}).save_pretrained(tmp_path)
    assert "| sal |" in card(tmp_path) and "| depth |" not in card(tmp_path)
    (tmp_path / "README.md").write_text("# my own")
    build(depth={}).save_pretrained(tmp_path)
    assert card(tmp_path) == "# my own"


def test_what_goes_to_the_hub_is_this_card(run, monkeypatch):
    """Without a network: the upload's content is looked at where the client would send it."""
    sent = {}
    monkeypatch.setattr(HfApi, "create_repo", lambda self, repo_id, **_: type("Url", (), {"repo_id": repo_id})())
    monkeypatch.setattr(
        HfApi, "upload_folder", lambda self, folder_path, **_: sent.update(text=card(Path(folder_path)))
    )
    load_model(run).push_to_hub("somebody/rooms", model_card_kwargs={"license": "apache-2.0"})
    assert "experiment: tiny" in sent["text"] and "pushed" not in sent["text"] and "apache-2.0" in sent["text"]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_says_what_its_values_are(name):
    assert create_task(name).meaning
