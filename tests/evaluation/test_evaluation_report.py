"""An evaluation's pages from results made by hand."""

from __future__ import annotations

import json
import math

from page import Page
from pamm.evaluation.command import compare_with
from pamm.evaluation.evaluate import Evaluation, OriginalResults
from pamm.evaluation.gain import compare
from pamm.evaluation.ranking import Ranking
from pamm.evaluation.report import format_evaluation, write_evaluation_report
from pamm.tasks import create_task

TASKS = {"semseg": create_task("semseg", classes=["sky", "tree"]), "depth": create_task("depth")}
ROW = {"semseg": {"mIoU": 43.456, "IoU/sky": 86.912, "IoU/tree": 0.0}, "depth": {"RMSE": math.nan}}


def ranking(*ids: str) -> Ranking:
    found = Ranking(2, higher_is_better=True, score="mIoU of the classes that occur")
    for score, image_id in enumerate(ids):
        found.add(image_id, float(score), lambda: {"image": "data:image/png;base64,AA=="})
    return found


def test_names_that_are_no_text_and_absent_values(tmp_path):
    ids = ("caf\udcff.jpg", "line\nbreak", "end")
    result = Evaluation(ROW, 3, "mine <val> split", {"source": "runs/<b>"}, rankings={"semseg": ranking(*ids)})
    path = write_evaluation_report(tmp_path / "new", [("<i>mine</i>", result)], TASKS, command="pamm eval 'a <b>'")
    page = Page(path.read_text(encoding="utf-8"))
    assert page.open == [] and len(page.images) == 3
    words = " ".join(page.words)
    assert r"caf\xff.jpg" in words and "line\nbreak" in words and "pamm eval 'a <b>'" in words
    markdown = (tmp_path / "new/results.md").read_text(encoding="utf-8")
    assert "| caf\\xff.jpg | 0.0000 | end | 2.000 |" in markdown.splitlines()
    assert "|  |  | line break | 1.000 |" in markdown.splitlines()
    assert "| RMSE, m | – |" in markdown.splitlines()
    content = json.loads((tmp_path / "new/results.json").read_text())
    assert content["results"]["depth"]["RMSE"] is None
    assert content["images_by_score"]["semseg"]["worst"] == [{"id": ids[0], "score": 0.0}]


def test_the_gain_of_each_task_and_what_is_not_compared(tmp_path):
    baseline = tmp_path / "before.json"
    before = {"results": {"semseg": {"mIoU": 40.0}, "depth": {"RMSE": 1.0}}, "protocol": "before"}
    baseline.write_text(json.dumps(before))
    own = OriginalResults({"semseg": {"mIoU": 41.0}, "depth": {"RMSE": 2.0}}, "at their own size", resized=2)
    named = [("untrained", Evaluation(ROW, 3, "p", original=own)), ("mine", Evaluation(ROW, 3, "p", original=own))]
    comparisons = {"frame": compare(ROW, str(baseline))}
    text = format_evaluation(named, TASKS, comparisons)
    assert "semseg +8.64; mean +8.64 (baseline: before)" in text
    assert "not compared: depth: no RMSE was measured" in text
    assert text.count("untrained") == 2 and "at their own size" in text
    page = Page(write_evaluation_report(tmp_path, named, TASKS, comparisons=comparisons).read_text(encoding="utf-8"))
    assert {"+8.64", "40.00", "43.46", "41.00", "not compared: depth: no RMSE was measured"} <= set(page.words)


def test_a_papers_saliency_stands_in_a_column_of_its_own(tmp_path):
    """Its printed maxF is maxF_released here: neither the column of the true maxF nor its Δ holds it."""
    row = {"sal": {"maxF": 80.0, "maxF_released": 85.0}, "edge": {"odsF": 72.0}}
    tasks = {name: create_task(name) for name in row}
    result = Evaluation(row, 5105, "p", data="pascal", boundaries="bdet")
    comparisons = compare_with("pamm-table-1-pascal", result)
    lines = format_evaluation([("mine", result)], tasks, comparisons).splitlines()
    assert [cell.strip() for cell in lines[0].split("  ") if cell] == [
        "sal maxF, % ↑",
        "sal maxF_released, % ↑",
        "edge odsF, % ↑",
        "Δ % ↑",
    ]
    assert lines[2].split()[1:] == ["–", "84.13", "71.32", "–"]
    assert lines[3].split()[:4] == ["mine", "80.00", "85.00", "72.00"]
    assert "compared by what the baseline's paper measured: sal by maxF_released" in lines
    assert "not measured alike: edge: measured on the split 'val', printed of 'test_new'" in lines
    path = write_evaluation_report(tmp_path, [("mine", result)], tasks, comparisons=comparisons)
    assert {"sal maxF_released, % ↑", "84.13"} <= set(Page(path.read_text(encoding="utf-8")).words)
    assert "not measured alike: edge" in (tmp_path / "results.md").read_text(encoding="utf-8")


def test_images_of_the_frames_size_have_one_table(tmp_path):
    same = OriginalResults({task: dict(values) for task, values in ROW.items()}, "own", resized=0)
    named = [("mine", Evaluation(ROW, 3, "p", original=same))]
    text = format_evaluation(named, TASKS, {})
    assert text.count("43.46") == 1 and "the numbers are the same" in text
    page = Page(write_evaluation_report(tmp_path, named, TASKS).read_text(encoding="utf-8"))
    assert any("the numbers are the same" in words for words in page.words)
