"""The multi-task gain, on the published tables."""

from __future__ import annotations

import json

import pytest

from pamm.evaluation.gain import Conditions, GainError, baselines, compare, multi_task_gain, paper_tables
from pamm.tasks import TASKS

PRINTED_TO = {"PAMM": 0.005, "MTMamba": 0.01}
"""Printed gains have two decimals: PAMM rounds them, so they are half a unit away at most; MTMamba cuts them off."""

ROWS = [(table, row) for table in paper_tables() for row in table.rows]
PRINTED = [(table, row) for table, row in ROWS if row.gain is not None]


def name(value) -> str:
    return getattr(value, "method", None) or f"{value.paper} {value.number} {value.dataset}"


def gain(table, row) -> float:
    return multi_task_gain(row.scores, baselines()[table.baseline].scores)


@pytest.mark.parametrize(("table", "row"), PRINTED, ids=name)
def test_every_printed_gain_follows_from_its_row_unless_listed(table, row) -> None:
    agrees = abs(gain(table, row) - row.gain) < PRINTED_TO[table.paper]
    assert agrees == (row.recomputed is None)
    if row.recomputed is not None:
        assert gain(table, row) == pytest.approx(row.recomputed, abs=0.005)


def test_the_rows_whose_printed_gain_does_not_follow() -> None:
    listed = {
        (t.paper, t.number, t.dataset, r.method, r.gain, r.recomputed) for t, r in ROWS if r.recomputed is not None
    }
    assert listed == {
        ("PAMM", "I", "nyud", "MQTransformer", 3.04, 1.95),
        ("PAMM", "I", "nyud", "M³ViT", -1.65, -3.42),
        ("PAMM", "V", "pascal", "top-15", -0.82, -0.66),
    }


def test_every_table_and_row_is_there() -> None:
    sizes = {(t.paper, t.number, t.dataset): len(t.rows) for t in paper_tables()}
    assert sizes == {
        ("PAMM", "I", "pascal"): 12,
        ("PAMM", "I", "nyud"): 13,
        ("PAMM", "II", "pascal"): 3,
        ("PAMM", "III", "pascal"): 4,
        ("PAMM", "IV", "pascal"): 4,
        ("PAMM", "V", "pascal"): 8,
        ("PAMM", "VI", "pascal"): 3,
        ("PAMM", "VII", "pascal"): 4,
        ("PAMM", "VIII", "pascal"): 3,
        ("MTMamba", "1", "nyud"): 9,
        ("MTMamba", "1", "pascal"): 9,
        ("MTMamba", "2", "nyud"): 6,
        ("MTMamba", "3", "nyud"): 2,
        ("MTMamba", "4", "nyud"): 2,
        ("MTMamba", "5", "nyud"): 3,
        ("MTMamba", "6", "nyud"): 4,
    }
    assert len(PRINTED) == 65


@pytest.mark.parametrize("table", paper_tables(), ids=name)
def test_tables_speak_of_known_tasks_in_their_units(table) -> None:
    assert set(table.tasks) <= set(TASKS)
    if table.baseline:
        assert baselines()[table.baseline].dataset == table.dataset
        assert set(baselines()[table.baseline].scores) == set(table.tasks)
    for row in table.rows:
        for task, score in row.scores.items():
            low, high = {"depth": (0.3, 1), "normals": (10, 25)}.get(task, (30, 100))
            assert low < score < high


def test_the_same_model_has_the_same_scores_in_every_table() -> None:
    """PAMM's ViT-B model stands in seven tables, MTMamba's in six."""
    pamm = [r.scores for t, r in ROWS if t.paper == "PAMM" and r.scores.get("semseg") == 79.12]
    assert len(pamm) == 8
    assert all(scores == pamm[0] for scores in pamm)
    full = [r.scores for t, r in ROWS if t.paper == "MTMamba" and r.scores.get("depth") == 0.5066]
    assert len(full) == 6
    assert all(value == full[0][task] for scores in full for task, value in scores.items())


def test_baselines_by_name() -> None:
    named = baselines()
    assert named["pamm-table-1-pascal"].scores["edge"] == 71.32
    assert named["mtmamba-nyud-single-task"].scores["semseg"] == 54.32
    assert {n for n in named if "single-task" in n} == {
        "mtmamba-nyud-single-task",
        "prism-pascal-vit-l-single-task",
        "prism-pascal-vit-b-single-task",
        "prism-nyud-vit-b-single-task",
    }
    mlore = {"semseg": 81.41, "human_parts": 70.52, "sal": 84.90, "normals": 13.51, "edge": 75.42}
    assert multi_task_gain(mlore, named["prism-pascal-vit-l-single-task"].scores) == pytest.approx(0.16, abs=0.005)
    plus = {"semseg": 57.01, "depth": 0.4818, "normals": 18.27, "edge": 79.40}
    assert multi_task_gain(plus, named["mtmamba-nyud-single-task"].scores) == pytest.approx(4.82, abs=0.01)


def test_gain_by_hand() -> None:
    higher = {"a": True, "b": False}
    assert multi_task_gain({"a": 110, "b": 4}, {"a": 100, "b": 5, "c": 7}, higher) == pytest.approx((10 + 20) / 2)
    assert multi_task_gain({"a": 100, "b": 6}, {"a": 100, "b": 5}, higher) == pytest.approx(-10)


@pytest.mark.parametrize(
    ("row", "baseline", "message"),
    [
        ({}, {"a": 1}, "at least one task"),
        ({"a": 1, "b": 2}, {"a": 1}, "no score in the baseline for b"),
        ({"a": 1}, {"a": 0}, "score is 0 for a"),
        ({"z": 1}, {"z": 1}, "no direction in higher_is_better for z"),
    ],
)
def test_impossible_gains_name_the_task(row, baseline, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        multi_task_gain(row, baseline, {"a": True, "b": True})


def test_gain_of_an_evaluation_over_a_named_baseline_leaves_out_what_is_not_comparable():
    row = {"semseg": {"mIoU": 57.036}, "depth": {"RMSE": 0.5166}, "edge": {"maxF_pixel": 20.0, "loss": 0.1}}
    found = compare(row, "mtmamba-nyud-single-task")
    assert found.gains == {"semseg": pytest.approx(100 * (57.036 - 54.32) / 54.32), "depth": 0}
    assert found.mean == pytest.approx(50 * (57.036 - 54.32) / 54.32)
    assert found.scores == {"semseg": 54.32, "depth": 0.5166}
    assert found.left_out == {"edge": "no odsF was measured", "normals": "no mErr was measured"}
    assert "Swin-L" in found.source and "nyud" in found.source
    assert compare(row, "mtmamba-nyud-single-task", "original") == found
    assert found.metrics == {"semseg": "mIoU", "depth": "RMSE"}


SAL = {"sal": {"maxF": 80.0, "maxF_released": 84.13}, "edge": {"odsF": 71.32}, "semseg": {"mIoU": 78.67}}


def test_saliency_is_compared_with_a_paper_by_what_the_paper_measured():
    found = compare(SAL, "pamm-table-1-pascal")
    assert found.gains == {"sal": 0, "edge": 0, "semseg": 0} and found.metrics["sal"] == "maxF_released"
    assert found.summary()["metrics"]["sal"] == "maxF_released"
    without = compare({"sal": {"maxF": 80.0}, "semseg": {"mIoU": 78.67}}, "pamm-table-1-pascal")
    assert without.left_out["sal"] == "no maxF_released was measured"
    prism = compare(SAL, "prism-pascal-vit-l-single-task")  # measured without the second sigmoid
    assert prism.gains["sal"] == pytest.approx(100 * (80.0 - 83.80) / 83.80) and prism.metrics["sal"] == "maxF"


@pytest.mark.parametrize(
    ("baseline", "own", "told"),
    [
        (
            "pamm-table-1-pascal",
            Conditions("pascal", "val"),
            ["edge: measured on the split 'val', printed of 'test_new'"],
        ),
        (
            "pamm-table-1-pascal",
            Conditions("pascal", "test_new"),
            ["sal, semseg: measured on the split 'test_new', printed of 'val'"],
        ),
        (
            "pamm-table-1-pascal",
            Conditions("pascal", {"sal": "val", "semseg": "val", "edge": "test_new"}, "seism"),
            ["edge: measured by the protocol 'seism', printed by 'bdet'"],
        ),
        (
            "pamm-table-1-pascal",
            Conditions("synthetic", "val"),
            ["measured on the data set 'synthetic', printed of 'pascal'"],
        ),
        ("pamm-table-1-nyud", Conditions("nyud", "val"), []),
        (
            "prism-pascal-vit-l-single-task",
            Conditions("pascal", "val"),
            ["edge: measured by the protocol 'bdet', printed by 'seism'"],
        ),
    ],
)
def test_what_was_measured_differently_from_a_paper_is_told(baseline, own, told):
    found = compare(SAL, baseline, own=own)
    assert list(found.differences) == told == found.summary()["measured_differently"]


def test_what_was_measured_differently_from_a_file_is_told(tmp_path):
    path = tmp_path / "before.json"
    path.write_text(json.dumps({"protocol": "mine val split", "results": SAL}))
    assert compare(SAL, str(path), protocol="mine val split").differences == []
    told = compare(SAL, str(path), protocol="mine test split").differences
    assert told == ["measured on: mine test split; the baseline on: mine val split"]
    assert compare(SAL, str(path), protocol="mine val split").metrics["sal"] == "maxF"


def test_gain_over_a_file_of_results(tmp_path):
    path = tmp_path / "before.json"
    results = {"edge": {"odsF": 20.0}, "sal": {"maxF": None}, "normals": {"loss": 1}, "depth": {"RMSE": 0.0}}
    path.write_text(json.dumps({"protocol": "as before", "results": results}))
    row = {"edge": {"odsF": 25.0}, "sal": {"maxF": 3.0}, "normals": {"mErr": 20.0}, "depth": {"RMSE": 1.0}}
    found = compare(row, str(path))
    assert found.gains == {"edge": 25.0} and found.mean == 25.0 and found.source == "as before"
    absent = {
        "sal": "the baseline has no maxF",
        "normals": "the baseline has no mErr",
        "depth": "the baseline's score is 0",
    }
    assert found.left_out == absent
    assert found.summary() == {
        "percent": 25.0,
        "tasks": {"edge": 25.0},
        "metrics": {"edge": "odsF"},
        "left_out": absent,
        "measured_differently": [],
    }


def test_a_file_of_results_is_compared_at_the_same_resolution(tmp_path):
    path = tmp_path / "before.json"
    own = {"protocol": "own size", "results": {"sal": {"maxF": 40.0}}}
    path.write_text(json.dumps({"protocol": "frame", "results": {"sal": {"maxF": 50.0}}, "original": own}))
    row = {"sal": {"maxF": 60.0}}
    assert compare(row, str(path)).mean == pytest.approx(20)
    assert compare(row, str(path), "original").mean == pytest.approx(50)
    path.write_text(json.dumps({"protocol": "frame", "results": {"sal": {"maxF": 50.0}}}))
    with pytest.raises(GainError, match=r"no results at the resolution 'original', only: frame.*--resolution both"):
        compare(row, str(path), "original")


@pytest.mark.parametrize(
    "content", ["[]", "{}", "no JSON", '{"results": {"sal": 3}}', '{"results": {"foo": {}}}', b"\xff"]
)
def test_another_file_is_no_baseline(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(GainError, match=r"other.json is not a results file of `pamm eval --out`"):
        compare({"sal": {"maxF": 3.0}}, str(path))


def test_an_unknown_baseline_names_the_known_ones():
    with pytest.raises(GainError, match=r"no baseline 'x' .*pamm-table-1-nyud"):
        compare({"depth": {"RMSE": 0.5}}, "x")
    with pytest.raises(GainError, match=r"nothing to compare .*depth: the baseline has no RMSE.*Choose a baseline of"):
        compare({"depth": {"RMSE": 0.5}}, "pamm-table-1-pascal")
