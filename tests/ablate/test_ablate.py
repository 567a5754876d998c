"""`pamm ablate` as a user meets it: rows trained, resumed and skipped, the table's figures, and what goes wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from command import run_command
from pamm.ablate.command import main
from pamm.ablate.cost import count_cost
from pamm.ablate.result import collect, mean_and_spread, printed_notes
from pamm.ablate.runs import make_plan
from pamm.ablate.tables import TABLES, AblationRow, AblationTable
from pamm.build import create_tasks
from pamm.command_line import parse_experiment
from pamm.config.experiment import dump
from pamm.config.recipes import get_recipe
from pamm.config.strict import ConfigError
from pamm.evaluation.gain import GainError
from pamm.training.run import create_loop
from tiny import experiment

ROWS = ["--only", "baseline,task-conv", "--seeds", "0,1", "--quiet"]


def parse(arguments: list[str]):
    return parse_experiment("train", arguments)[0]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """An experiment.yaml small enough for a test, with the cache of its data beside it."""
    folder = tmp_path_factory.mktemp("base")
    dump(experiment(str(folder / "rooms"), steps=2, save_every=1), folder / "tiny.yaml")
    return folder / "tiny.yaml"


def told(capsys, *arguments: object, code: int = 0) -> str:
    """Run `pamm ablate`, expect an exit code; returns what it said."""
    return run_command(capsys, "ablate", *arguments, code=code)


def plan_of(base: Path, out: Path, *options: str, table: AblationTable | None = None, rows: int | None = None):
    """The runs of a table's first rows, by default PAMM's Table II, with one seed; `options` as on the command line."""
    table = table or TABLES["pamm-2"]
    return make_plan(
        table, table.rows[:rows], base=str(base), seeds=[0], out=out, resolve=lambda r: parse([r, *options])
    )


@pytest.fixture(scope="module")
def done(base, tmp_path_factory) -> Path:
    """The output folder of two rows with two seeds."""
    out = tmp_path_factory.mktemp("done") / "out"
    assert main(["pamm-2", "--base", str(base), "--out", str(out), *ROWS]) == 0
    return out


def read(out: Path, table: str = "pamm-2") -> dict:
    return json.loads((out / f"{table}.json").read_text())


def test_two_rows_with_two_seeds_give_the_table(done):
    table = read(done)
    assert [(row["label"], row["recipe"].rpartition("+")[2]) for row in table["rows"]] == [
        ("without TC and PAME", "baseline"),
        ("TC", "task-conv"),
    ]
    folders = [done / f"tiny.yaml+{variant}/seed-{seed}" for variant in ("baseline", "task-conv") for seed in (0, 1)]
    results = [json.loads((folder / "results.json").read_text())["results"] for folder in folders]
    for row, (first, second) in zip(table["rows"], (results[:2], results[2:]), strict=True):
        values = np.array([first["normals"]["mErr"], second["normals"]["mErr"]])
        assert list(row["scores"]["0"]) == ["semseg", "depth", "human_parts", "sal", "normals", "edge"]
        assert row["mean"]["normals"] == pytest.approx(values.mean())
        assert row["spread"]["normals"] == pytest.approx(values.std(ddof=1))
    assert results[0] != results[1]
    assert table["rows"][0]["gains"] == {"0": 0, "1": 0} and table["failed"] == {}
    page = (done / "pamm-2.md").read_text()
    assert "semseg mIoU, % ↑" in page and "depth RMSE, m ↓" in page and " ± " in page and "val split, 5 images" in page
    assert "| TC | 78.01 | 67.35 | 84.92 | 13.59 | 70.10 | +1.03 |" in page


def test_finished_runs_are_left_alone(done, base, capsys):
    before = {path: path.stat().st_mtime_ns for path in done.rglob("results.json")}
    text = told(capsys, "pamm-2", "--base", base, "--out", done, *ROWS)
    assert "0 of 4 runs to train" in text and len(before) == 4
    assert {path: path.stat().st_mtime_ns for path in done.rglob("results.json")} == before


def test_a_killed_run_goes_on_to_the_same_figures(done, base, tmp_path, capsys):
    plan = plan_of(base, tmp_path, rows=1)
    loop, loader = create_loop(plan.runs[0].experiment, plan.runs[0].folder)
    for parts in islice(loader, 1):
        loop._one_step(parts)
    loop.close()
    arguments = ["pamm-2", "--base", base, "--out", tmp_path, "--only", "baseline", "--quiet"]
    assert "begun" in told(capsys, *arguments, "--dry-run")
    assert "1 of 1 runs to train" in told(capsys, *arguments)
    results = "tiny.yaml+baseline/seed-0/results.json"
    mine, whole = (json.loads((folder / results).read_text())["results"] for folder in (tmp_path, done))
    assert mine == whole


def test_the_plan_is_told_without_training(base, tmp_path, capsys):
    text = told(capsys, "pamm-3", "--base", base, "--seeds", "0,1", "--out", tmp_path / "new", "--dry-run")
    lines = text.splitlines()
    assert len(lines) == 8 and all(line.endswith("not begun") for line in lines)
    assert [line.partition(":")[0] for line in lines[:5]] == [
        "experts on B and C, seed 0",
        "experts on C, seed 0",
        "experts on B, seed 0",
        "without experts, seed 0",
        "experts on B and C, seed 1",
    ]
    assert not (tmp_path / "new").exists()


def test_tables_share_their_runs(done, base, capsys):
    """Table III's row of the whole network and Table II's are one run; a row of another table is not trained again."""
    text = told(capsys, "pamm-2", "--base", base, "--out", done, "--only", "baseline", "--dry-run")
    assert "finished" in text
    both = [f"pamm-{number}" for number in (2, 3)]
    folders = [told(capsys, name, "--base", base, "--out", done, "--dry-run").splitlines() for name in both]
    assert folders[0][2].split(": ")[1] == folders[1][0].split(": ")[1]


def test_a_row_that_cannot_be_does_not_lose_the_others(done, base, capsys):
    """The tiny network has two stages: three are not there."""
    arguments = ["pamm-7", "--base", base, "--out", done, "--only", "stages-1,stages-3", "--quiet"]
    text = told(capsys, *arguments, code=1)
    assert "failed: 3 stages: the variant 'stages-3' changes nothing" in text
    rows = {row["label"]: row for row in read(done, "pamm-7")["rows"]}
    assert len(rows["1 stage"]["scores"]) == 1 and not rows["3 stages"]["scores"]


def test_a_folder_of_another_experiment_is_refused_and_the_other_rows_go_on(base, done, tmp_path, capsys):
    out = tmp_path / "out"
    (out / "tiny.yaml+baseline").mkdir(parents=True)
    (out / "tiny.yaml+baseline/seed-0").symlink_to(done / "tiny.yaml+baseline/seed-0")
    arguments = [
        "pamm-2",
        "--base",
        base,
        "--out",
        out,
        "--only",
        "baseline,task-conv",
        "--train.steps",
        "1",
        "--quiet",
    ]
    text = told(capsys, *arguments, code=1)
    assert "failed: without TC and PAME: seed 0:" in text and "holds another experiment" in text
    assert "train.steps: 2 there, 1 here). Choose another folder with --out" in text
    assert [len(row["scores"]) for row in read(out)["rows"]] == [0, 1]


def test_a_curve_has_a_row_per_evaluation(base, tmp_path, capsys):
    told(capsys, "pamm-fig8", "--base", base, "--out", tmp_path, "--tasks", "normals,edge", "--quiet")
    rows = read(tmp_path, "pamm-fig8")["rows"]
    assert [row["label"] for row in rows] == ["step 1", "step 2"]
    log = [json.loads(line) for line in (tmp_path / "pamm-fig8/tiny.yaml/seed-0/log.jsonl").read_text().splitlines()]
    assert [row["mean"]["edge"] for row in rows] == [e["edge/maxF_pixel"] for e in log if e["kind"] == "val"]
    assert "edge maxF_pixel, % ↑" in (tmp_path / "pamm-fig8.md").read_text()
    with (tmp_path / "pamm-fig8/tiny.yaml/seed-0/log.jsonl").open("a") as log:
        log.write('{"kind": "val", "st')  # as a full disk leaves it
    told(capsys, "pamm-fig8", "--base", base, "--out", tmp_path, "--tasks", "normals,edge", "--report")
    assert read(tmp_path, "pamm-fig8")["rows"] == rows


def test_a_task_is_measured_on_another_split(done, base, tmp_path, capsys):
    """Trained runs, boundaries on the training images: what `pamm eval --split` gives, written beside the run, once."""
    shutil.copytree(done, tmp_path / "out")
    arguments = ["pamm-2", "--base", base, "--out", tmp_path / "out", *ROWS]
    assert "measured on the splits of --split" in told(capsys, *arguments, "--split", "edge=train", "--report", code=1)
    text = told(capsys, *arguments, "--split", "edge=train")
    assert "0 of 4 runs to train" in text and text.count("edge on the split 'train'") == 4
    assert "edge: synthetic train split, " in text and "synthetic val split, 5 images" in text
    before, after = read(done), read(tmp_path / "out")
    assert after["splits"] == {"edge": "train"} and before["splits"] == {}
    folder = tmp_path / "out/tiny.yaml+baseline/seed-0"
    run_command(capsys, "eval", folder, "--split", "train", "--pictures", 0, "--out", tmp_path / "e.json", code=0)
    expected = json.loads((tmp_path / "e.json").read_text())["results"]["edge"]["odsF"]
    assert after["rows"][0]["scores"]["0"] == before["rows"][0]["scores"]["0"] | {"edge": expected}
    assert "on the split" not in told(capsys, *arguments, "--split", "edge=train")
    assert read(tmp_path / "out") == after
    told(capsys, *arguments, "--split", "val", "--report")
    assert read(tmp_path / "out")["rows"] == before["rows"]


@pytest.mark.parametrize(
    ("table", "split", "message"),
    [
        ("pamm-2", "test_new", "synthetic data has no split 'test_new'"),
        ("pamm-2", "dept=val", "--split: 'dept' is none of the tasks here"),
        ("pamm-2", "=val", "--split: found '=val', expected a split's name or TASK=NAME"),
        ("pamm-2", "../../x", "--split: found '../../x', expected"),
        ("pamm-fig8", "train", "--split: 'pamm-fig8' shows the evaluations of a training"),
    ],
)
def test_splits_that_cannot_be_are_told_before_training(base, tmp_path, capsys, table, split, message):
    out = tmp_path / "new"
    assert message in told(capsys, table, "--base", base, "--out", out, "--split", split, code=1)
    assert not out.exists()


def test_a_papers_table_shows_what_the_paper_measured(done, base, tmp_path, capsys):
    """Printed maxF is maxF_released: the column and Δ hold it; that other data were measured is told."""
    out = tmp_path / "out"
    shutil.copytree(done, out)
    for variant, score in (("baseline", 40.0), ("task-conv", 44.0)):
        path = out / f"tiny.yaml+{variant}/seed-0/results.json"
        content = json.loads(path.read_text())
        content["results"] = {"sal": content["results"]["sal"] | {"maxF": 77.7, "maxF_released": score}}
        path.write_text(json.dumps(content))
    text = told(capsys, "pamm-2", "--base", base, "--out", out, *ROWS, "--report")
    assert text.count("sal maxF_released, % ↑") == 2 and "sal maxF, %" not in text
    assert "maxF_released is what the paper prints as maxF" in text
    assert "Not measured alike: measured on the data set 'synthetic', printed of 'pascal'." in text
    rows = read(out)["rows"]
    assert [row["scores"]["0"] for row in rows] == [{"sal": 40.0}, {"sal": 44.0}]
    assert rows[1]["gains"]["0"] == pytest.approx(10.0)


def test_boundaries_on_the_papers_images_are_asked_for(capsys, tmp_path):
    plan = make_plan(
        TABLES["pamm-2"],
        TABLES["pamm-2"].rows,
        base="pascal-pamm-b",
        seeds=[0],
        out=tmp_path,
        resolve=get_recipe,
    )
    notes = printed_notes(plan)
    assert "Not measured alike: edge: measured on the split 'val', printed of 'test_new'." in notes
    assert "--split edge=test_new measures boundaries as printed." in notes
    assert len(printed_notes(replace(plan, splits={"edge": "test_new"}))) == 1


def test_why_no_row_can_be_is_told(base, tmp_path, capsys):
    text = told(capsys, "pamm-2", "--base", base, "--out", tmp_path, "--tasks", "dept", "--quiet", code=1)
    assert "no row of 'pamm-2' has results. " in text and "--tasks: 'dept' is none of this experiment's tasks" in text


def test_runs_with_other_evaluations_are_not_this_tables(base, done, tmp_path, capsys):
    (tmp_path / "tiny.yaml+baseline").symlink_to(done / "tiny.yaml+baseline")
    options = ("--base", base, "--out", tmp_path, "--only", "baseline", "--train.eval-every", "1")
    assert "holds another experiment (train.eval_every: " in told(capsys, "pamm-2", *options, "--dry-run")


def test_a_finished_run_without_its_optimizer_is_not_overwritten(base, done, tmp_path, capsys):
    shutil.copytree(done / "tiny.yaml+baseline/seed-0", tmp_path / "tiny.yaml+baseline/seed-0")
    shutil.rmtree(tmp_path / "tiny.yaml+baseline/seed-0/last")
    kept = (tmp_path / "tiny.yaml+baseline/seed-0/results.json").read_bytes()
    options = ("--base", base, "--out", tmp_path, "--only", "baseline", "--quiet", "--train.lr", "0.5")
    assert "holds another experiment (train.lr: " in told(capsys, "pamm-2", *options, code=1)
    assert (tmp_path / "tiny.yaml+baseline/seed-0/results.json").read_bytes() == kept


def test_costs_do_not_depend_on_the_engine_that_is_asked_for(base, monkeypatch):
    experiment = parse([str(base)])
    counted = count_cost(experiment, create_tasks(experiment))
    monkeypatch.setenv("PAMM_SCAN_ENGINE", "reference")
    assert count_cost(experiment, create_tasks(experiment)) == counted
    monkeypatch.setenv("PAMM_KERNELS", "off")
    assert count_cost(experiment, create_tasks(experiment)) == counted


def test_a_yml_file_takes_variants(base, tmp_path):
    file = tmp_path / "mine.yml"
    file.write_bytes(base.read_bytes())
    assert parse([f"{file}+no-priors"]).name.endswith("+no-priors")


def test_one_network_per_task_is_one_row(base, tmp_path, capsys):
    """The reference of MTMamba's Table 2; here with the tiny PAMM, the variant being its own."""
    table = AblationTable("single", "", "", (AblationRow("single", "+baseline", per_task=True),))
    plan = plan_of(base, tmp_path, "--tasks", "depth,normals", table=table)
    assert [(list(run.experiment.tasks), run.folder.name) for run in plan.runs] == [
        (["depth"], "depth"),
        (["normals"], "normals"),
    ]
    for number, run in enumerate(plan.runs):
        assert not collect(plan)[0].scores
        write(run, {"RMSE": 0.5, "mErr": 20.0 + number})
    assert collect(plan)[0].scores == {0: {"depth": 0.5, "normals": 21.0}}


def write(run, scores: dict[str, float | None]) -> None:
    """A finished run with these scores of each of its tasks."""
    run.folder.mkdir(parents=True)
    dump(run.experiment, run.folder / "experiment.yaml")
    results = dict.fromkeys(run.experiment.tasks, scores)
    (run.folder / "results.json").write_text(json.dumps({"protocol": "p", "results": results}))


def test_means_spreads_and_paired_gains_are_numpys(base, tmp_path, capsys):
    """Three seeds of two rows, one of them with a run missing: Δ is over the seeds that both rows have."""
    generator = np.random.default_rng(0)
    settings = {"base": str(base), "seeds": [0, 1, 2], "out": tmp_path}
    tasks = ["--tasks", "depth,normals"]
    plan = make_plan(TABLES["pamm-2"], TABLES["pamm-2"].rows[:2], resolve=lambda r: parse([r, *tasks]), **settings)
    values = generator.uniform(1, 2, (2, 3, 2))  # row, seed, task
    for row, label in enumerate(("without TC and PAME", "TC")):
        for seed in (0, 1, 2):
            if (row, seed) != (0, 1):
                (run,) = plan.of(label, seed)
                write(run, dict(zip(("RMSE", "mErr"), values[row, seed], strict=True)))
    results = collect(plan)
    shared = [0, 2]
    gains = 100 * ((values[0, shared] - values[1, shared]) / values[0, shared]).mean(1)  # both tasks: lower is better
    assert list(results[1].gains) == shared
    np.testing.assert_allclose(list(results[1].gains.values()), gains)
    mean, spread = mean_and_spread(list(results[1].gains.values()))
    np.testing.assert_allclose([mean, spread], [gains.mean(), gains.std(ddof=1)])
    np.testing.assert_allclose(
        mean_and_spread(results[1].of("depth")), [values[1, :, 0].mean(), values[1, :, 0].std(ddof=1)]
    )
    assert mean_and_spread([3.0]) == (3.0, None)
    arguments = [
        "pamm-2",
        "--base",
        base,
        "--out",
        tmp_path,
        "--seeds",
        "0,1,2",
        "--only",
        "baseline,task-conv",
        *tasks,
    ]
    text = told(capsys, *arguments, "--report")
    line = next(line for line in text.splitlines() if line.startswith("TC"))
    depth, gain = values[1, :, 0], f"{gains.mean():+.2f} ± {gains.std(ddof=1):.2f}"
    assert gain in line and f" ± {depth.std(ddof=1):.3f}"[:7] in line and line.endswith(" 3")
    assert "each seed against the same seed" in text


def test_a_score_that_is_not_finite_takes_its_gain_with_it(base, tmp_path):
    plan = plan_of(base, tmp_path, rows=2)
    for run, sal in zip(plan.runs, (None, 50.0), strict=True):
        write(run, {"mIoU": 1.0, "RMSE": 1.0, "mErr": 1.0, "odsF": 1.0, "maxF_released": sal})
    results = collect(plan)
    assert "sal" not in results[0].scores[0] and results[1].gains == {}


def test_a_damaged_experiment_file_does_not_lose_the_other_rows(base, done, tmp_path, capsys):
    for variant in ("baseline", "task-conv"):
        (tmp_path / f"tiny.yaml+{variant}").mkdir()
    (tmp_path / "tiny.yaml+task-conv/seed-0").symlink_to(done / "tiny.yaml+task-conv/seed-0")
    (tmp_path / "tiny.yaml+baseline/seed-0/last").mkdir(parents=True)
    (tmp_path / "tiny.yaml+baseline/seed-0/last/model.safetensors").write_bytes(b"weights")
    (tmp_path / "tiny.yaml+baseline/seed-0/experiment.yaml").write_text("train: {stepps: 3}")
    text = told(capsys, "pamm-2", "--base", base, "--out", tmp_path, "--only", "baseline,task-conv", "--quiet", code=1)
    assert "failed: without TC and PAME: seed 0: " in text and "unknown key 'train.stepps'" in text
    assert [len(row["scores"]) for row in read(tmp_path)["rows"]] == [0, 1]


def test_a_damaged_result_is_told(base, tmp_path):
    plan = plan_of(base, tmp_path, rows=1)
    write(plan.runs[0], {})
    (plan.runs[0].folder / "results.json").write_text("{}")
    with pytest.raises(
        GainError, match=r"results.json is not a results file .*Remove it: the run is then evaluated again"
    ):
        collect(plan)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["pamm-9"], 1, r"unknown table 'pamm-9'"),
        (["benchmark", "--base", "demo"], 1, r"--base: the rows of 'benchmark' name their recipes; leave it out"),
        (
            ["pamm-2", "--only", "experts"],
            1,
            r"--only: 'experts' is no row of 'pamm-2'; its rows: without TC and PAME, TC",
        ),
        (["pamm-2", "--seeds", "a"], 2, r"found 'a', expected seeds as in 0,1,2"),
        (["pamm-2", "--train.step", "3", "--dry-run"], 2, r"--train.step"),
        (
            ["pamm-2", "--report", "--out", "nothing/here"],
            1,
            r"no run of 'pamm-2' in nothing/here is finished \(not begun\)",
        ),
        (
            ["pamm-2", "--base", "nyud-mtmamba", "--dry-run"],
            1,
            r"failed: TC: unknown variant 'task-conv' of 'nyud-mtmamba'",
        ),
        ([], 2, r"the following arguments are required: table"),
    ],
)
def test_errors_say_what_to_do(arguments, code, message, capsys):
    import re

    assert re.search(message, told(capsys, *arguments, code=code))


def test_variants_of_a_file_are_those_of_its_decoder(base):
    assert not parse([f"{base}+no-priors+s-scan"]).model.decoder.prior_B
    with pytest.raises(ConfigError, match=r"unknown variant 'no-prior' of '.*tiny.yaml'. Did you mean 'no-priors'"):
        parse([f"{base}+no-prior"])
