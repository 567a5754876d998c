"""`pamm eval` on photographs of mixed sizes with hostile names: the numbers, the ranked images and the report's folder."""

from __future__ import annotations

import base64
import io
import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image

from page import Page
from pamm.cli import main
from pamm.config.experiment import DataConfig, Experiment
from pamm.data import dataset_options, open_dataset
from pamm.data.transforms import EvalTransform
from pamm.models.saved import load_model
from pamm.tasks import create_task
from pamm.training.run import train
from tiny import experiment

IDS = ["<img src=x onerror=alert(1)>", "a|b *c* `d`", '"quoted" & more', "plain", "ünï çode", "<script>alert(2)<"]
SMALL = (40, 60)
"""Size of every other image, which fits into the frame as it is; the rest is 96×128."""
LABELS = {"human_parts": [0, 1, 2, 4], "sal": [1, 2, 3], "depth": [0, 3, 4, 5], "semseg": [0, 1, 2, 3, 5]}
"""Task → the images that have a label of it; the other tasks: all."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder, and beside it the data set `mixed` whose images and labels are rooms."""
    folder = tmp_path_factory.mktemp("evaluation")
    rooms = DataConfig(name="synthetic", root=str(folder / "rooms"), size=(96, 128), images=(1, len(IDS)))
    options = dataset_options(rooms)
    tasks = {name: create_task(name, **options[name]) for name in options}
    data = open_dataset(rooms, "val", tasks)
    data.prepare(progress=False)
    for split in ("train", "val"):
        for kind in ("images", *tasks):
            (folder / "mixed" / split / kind).mkdir(parents=True)
        for index, image_id in enumerate(IDS):
            sample = data[index]
            height, width = SMALL if index % 2 else sample.size
            image = sample.image[:, :height, :width].permute(1, 2, 0).numpy()
            Image.fromarray(image).save(folder / "mixed" / split / f"images/{image_id}.png")
            for name, label in sample.labels.items():
                if index in LABELS.get(name, range(len(IDS))):
                    values = tasks[name].truth(label[:, :height, :width]).numpy()
                    suffix, content = tasks[name].label_file(values)
                    (folder / "mixed" / split / name / f"{image_id}{suffix}").write_bytes(content)
    (folder / "mixed/dataset.yaml").write_text(yaml.safe_dump({"tasks": {name: options[name] for name in tasks}}))
    mixed = DataConfig(name="folder", root=str(folder / "mixed"), size=(48, 64), fit=True)
    train(replace(experiment(steps=2), data=mixed), folder / "run", progress=False)
    return folder / "run"


def evaluated(run: Path, out: Path, *more: object) -> dict:
    """The JSON of a `pamm eval`."""
    arguments = ["eval", run, "--device", "cpu", "--workers", 0, "--out", out, *more]
    assert main([str(argument) for argument in arguments]) == 0
    return json.loads(out.read_text())


@pytest.mark.slow
def test_the_same_json_and_pages_for_any_batch_size_and_number_of_processes(run, tmp_path):
    results, pages = [], []
    for batch, devices in ((1, 1), (4, 1), (2, 2)):
        place = tmp_path / f"{batch}_{devices}"
        arguments = [run, "--batch", batch, "--devices", devices, "--pictures", 2, "--report", place]
        given = ["eval", *map(str, arguments), "--device", "cpu", "--workers", "0"]
        if devices == 1:
            assert main(given) == 0
        else:
            command = [sys.executable, "-m", "pamm", *given]
            environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
            done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
            assert done.returncode == 0, done.stderr
        results.append(json.loads((place / "results.json").read_text()))
        # the command line, which stands in the page, is all that may differ
        text = "".join((place / name).read_text() for name in ("results.md", "report.html"))
        pages.append("\n".join(line for line in text.splitlines() if "pamm eval" not in line))
    assert all(result == results[0] for result in results)
    assert all(page == pages[0] for page in pages)
    assert {"odsF", "oisF", "AP"} <= set(results[0]["results"]["edge"]) & set(results[0]["original"]["results"]["edge"])


def test_every_metric_at_both_resolutions(run, tmp_path):
    found = evaluated(run, tmp_path / "both.json")
    assert (found["split"], found["images"], found["resolution"]) == ("val", 6, "frame")
    assert "frame 48×64" in found["protocol"] and "at the frame's resolution" in found["protocol"]
    trained = json.loads((run / "results.json").read_text())
    assert found["results"] == trained["results"]
    own = found["original"]
    assert (own["split"], own["images"], own["resolution"], own["resized"]) == ("val", 6, "original", 3)
    assert "to its own size" in own["protocol"] and "3 of the images have another size" in own["protocol"]
    expected = {
        "semseg": {"mIoU", "pixel_accuracy"},
        "human_parts": {"mIoU", "IoU/head"},
        "depth": {"RMSE", "log_RMSE", "abs_rel", "sq_rel", "delta_1.25", "delta_1.25^2", "delta_1.25^3"},
        "normals": {"mErr", "median", "RMSE", "within_11.25", "within_22.5", "within_30"},
        "sal": {"maxF", "maxF_released"},
        "edge": {"odsF", "oisF", "AP"},
    }
    for task, metrics in expected.items():
        assert metrics <= set(found["results"][task]), task
        assert set(own["results"][task]) == set(found["results"][task]) - {"loss"}
        assert own["results"][task] != {k: v for k, v in found["results"][task].items() if k != "loss"}, task
    alone = evaluated(run, tmp_path / "original.json", "--resolution", "original")
    assert "results" not in alone and alone["original"] == own
    assert alone["images_by_score"] == found["images_by_score"]
    frame = evaluated(run, tmp_path / "frame.json", "--resolution", "frame", "--pictures", 0)
    assert "original" not in frame and "images_by_score" not in frame and frame["results"] == found["results"]


def test_ranked_images_are_those_of_a_full_sort(run, tmp_path):
    found = evaluated(run, tmp_path / "out.json", "--pictures", 2, "--resolution", "frame")["images_by_score"]
    settings: Experiment = replace(
        experiment(), data=DataConfig("folder", str(run.parent / "mixed"), (48, 64), fit=True)
    )
    model = load_model(run).eval()
    options = dataset_options(settings.data)
    tasks = {name: create_task(name, **options[name]) for name in model.tasks}
    data = open_dataset(settings.data, "val", tasks)
    transform = EvalTransform(tasks, settings.data)
    samples = [transform(data[index]) for index in range(len(data))]
    assert set(found) == set(tasks)
    for name, task in tasks.items():
        order = []
        for sample in samples:
            if name in sample.labels:
                logits = model(sample.image[None])[name].detach()
                score = float(f"{task.score_image(logits, sample.labels[name][None]):.6g}")
                order.append((score if task.higher_is_better else -score, sample.id, score))
        order = sorted(entry for entry in order if not math.isnan(entry[0]))
        half = len(order) // 2
        ids = {side: [one["id"] for one in found[name][side]] for side in ("worst", "best")}
        assert ids == {
            "worst": [image_id for _, image_id, _ in order[: min(2, half)]],
            "best": [image_id for _, image_id, _ in order[::-1][: min(2, len(order) - half)]],
        }
        scores = {one["id"]: one["score"] for side in ("worst", "best") for one in found[name][side]}
        assert all(scores[image_id] == score for _, image_id, score in order if image_id in scores)


def test_the_page_holds_its_pictures_and_escapes_every_name(run, tmp_path, capsys):
    evaluated(run, tmp_path / "before.json")
    arguments = ("--report", tmp_path / "report", "--baseline", tmp_path / "before.json", "--untrained")
    found = evaluated(run, tmp_path / "out.json", *arguments)
    told = capsys.readouterr().out
    assert "mean +0.00" in told and "untrained" in told and "own size" in told and "report.html" in told
    assert (tmp_path / "report/results.json").read_text() == (tmp_path / "out.json").read_text()
    assert found["gain"]["frame"]["percent"] == found["gain"]["original"]["percent"] == 0
    text = (tmp_path / "report/report.html").read_text()
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "link" not in page.tags and "http" not in text
    ranked = {task: lists["worst"] + lists["best"] for task, lists in found["images_by_score"].items()}
    bars = [image for image in page.images if image["alt"].endswith(": scale")]
    assert [bar["alt"] for bar in bars] == [f"{one['id']}: scale" for one in ranked["depth"]]
    pictures = [image for image in page.images if image not in bars]
    assert len(pictures) == 3 * sum(map(len, ranked.values()))
    for image in pictures:
        assert set(image) == {"src", "alt"}
        head, _, data = image["src"].partition(",")
        with Image.open(io.BytesIO(base64.b64decode(data))) as picture:
            assert head == f"data:image/{picture.format.lower()};base64"
            assert max(picture.size) == 288
    shown = {image["alt"] for image in page.images}
    for images in ranked.values():
        for one in images:
            assert one["id"] in page.words
            assert {f"{one['id']}: {what}" for what in ("image", "prediction", "truth")} <= shown
    assert {one["id"] for images in ranked.values() for one in images} == set(IDS)
    assert {
        found["protocol"],
        found["original"]["protocol"],
        "pamm",
        "Δ % ↑",
        "within_22.5, %",
        "median, °",
        "head",
    } <= set(page.words)
    again = tmp_path / "again"
    os.rename(tmp_path / "report", again)
    evaluated(run, tmp_path / "out.json", *arguments)
    for name in ("report.html", "results.md", "results.json"):
        assert (tmp_path / "report" / name).read_bytes() == (again / name).read_bytes()


def test_markdown_has_tables_of_equal_width_whatever_the_names(run, tmp_path):
    found = evaluated(run, tmp_path / "out.json", "--report", tmp_path / "report")
    lines = (tmp_path / "report/results.md").read_text().splitlines()
    assert found["protocol"] in lines and found["original"]["protocol"] in lines
    plain = [line.replace("\\|", "") for line in lines]
    widths = 0
    for line in plain:
        bars = line.count("|")
        assert not bars or not widths or bars == widths, line
        widths = bars
    text = "\n".join(lines)
    assert r"\<img src=x onerror=alert(1)\>" in text and "<img" not in text.replace(r"\<", "")
    for task, metrics in found["results"].items():
        assert f"### {task}" in lines
        units = {key: create_task(task).titled(key) for key in metrics}
        assert all(f"| {units[key]} |" in text for key in metrics)
    assert "| sq_rel, m |" in text and "| abs_rel |" in text and "| IoU/head, % |" in text


def test_results_are_kept_where_the_baseline_cannot_be_compared(run, tmp_path, capsys):
    (tmp_path / "base.json").write_text('{"results": {"depth": {"RMSE": 1.0}}}')
    options = ("--resolution", "original", "--baseline", tmp_path / "base.json", "--out", tmp_path / "r.json")
    assert main([str(a) for a in ("eval", run, "--device", "cpu", "--pictures", 0, *options)]) == 1
    told = capsys.readouterr()
    assert "base.json" in told.err and "Traceback" not in told.err
    assert json.loads((tmp_path / "r.json").read_text())["original"]


def test_what_cannot_be_done_is_told_before_anything_is_measured(run, tmp_path, capsys):
    def told(*arguments: object) -> str:
        assert main([str(a) for a in ("eval", run, "--device", "cpu", *arguments)]) == 1
        return capsys.readouterr().err

    assert "known baselines: " in told("--baseline", "nothing")
    (tmp_path / "other.json").write_text("{}")
    assert "not a results file of `pamm eval --out`" in told("--baseline", tmp_path / "other.json")
    assert "Is a directory" in told("--out", tmp_path)
    (tmp_path / "file").write_text("")
    assert "file" in told("--report", tmp_path / "file")
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--resolution", "padded"])
    assert "choose from" in capsys.readouterr().err
