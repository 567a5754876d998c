"""Tables with the right digits and arrows; a page that holds the numbers, names its protocol and finds its pictures."""

import math
from urllib.parse import unquote

import numpy as np
import pytest
import torch
from PIL import Image

from page import Page
from pamm.data.transforms import normalize
from pamm.drawing.colours import scale_bar, scale_text
from pamm.drawing.page import Figure, figure_from, write_report
from pamm.drawing.table import score_table
from pamm.tasks import TASKS as REGISTERED
from pamm.tasks import create_task

TASKS = {
    "semseg": create_task("semseg", classes=["sky", "tree & bush"]),
    "depth": create_task("depth"),
    "normals": create_task("normals"),
}
ROWS = [
    (
        "untrained",
        {
            "semseg": {"mIoU": 3.512, "pixel_accuracy": 9.1, "IoU/sky": 0.0, "IoU/tree & bush": 7.024},
            "depth": {"RMSE": 1.25},
            "normals": {"mErr": math.nan},
        },
    ),
    (
        "trained <1>",
        {
            "semseg": {"mIoU": 45.678, "pixel_accuracy": 81.25, "IoU/sky": 61.5, "IoU/tree & bush": 29.856},
            "depth": {"RMSE": 0.48184, "abs_rel": 0.1},
        },
    ),
]


def test_text_table_is_aligned_with_arrows_and_four_digits():
    assert str(score_table(ROWS, TASKS, gains=[None, 12.3456])).splitlines() == [
        "             semseg mIoU, % ↑  depth RMSE, m ↓  normals mErr, ° ↓   Δ % ↑",
        "-----------  ----------------  ---------------  -----------------  ------",
        "untrained                3.51           1.2500                  –       –",
        "trained <1>             45.68           0.4818                  –  +12.35",
    ]


def test_markdown_table_marks_the_best_and_keeps_its_columns():
    assert score_table([("a|b", ROWS[0][1]), ROWS[1]], TASKS).markdown().splitlines() == [
        "|  | semseg mIoU, % ↑ | depth RMSE, m ↓ | normals mErr, ° ↓ |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 3.51 | 1.2500 | – |",
        "| trained \\<1\\> | **45.68** | **0.4818** | – |",
    ]


def test_values_that_are_not_finite_are_shown_as_absent():
    rows = [("diverged", {"depth": {"RMSE": math.inf}}), ("good", {"depth": {"RMSE": 0.5}})]
    table = score_table(rows, {"depth": TASKS["depth"]}, gains=[-math.inf, 1.0])
    assert [line.split()[1:] for line in str(table).splitlines()[2:]] == [["–", "–"], ["0.5000", "+1.00"]]
    assert "**" not in table.markdown()
    assert str(score_table(rows[:1], {"depth": TASKS["depth"]})).endswith("–")


def test_a_table_without_rows_and_one_with_too_few_gains():
    assert "semseg mIoU" in str(score_table([], TASKS))
    with pytest.raises(ValueError, match="1 gains for 2 rows"):
        score_table(ROWS, TASKS, gains=[1.0])


def pictures(*names: str, shade: int) -> dict[str, np.ndarray]:
    return {name: np.full((12, 20, 3), shade + i, np.uint8) for i, name in enumerate(names)}


def test_report_holds_the_numbers_and_its_pictures(tmp_path):
    image = np.full((12, 20, 3), 7, np.uint8)
    figures = [
        Figure("street/1 <a>.jpg", image, pictures(*TASKS, shade=50), pictures("depth", shade=90)),
        Figure("street 1 _a_.jpg", image, pictures(*TASKS, shade=60), pictures(*TASKS, shade=70)),
    ]
    path = write_report(
        tmp_path / "run",
        title="Rooms & <script>alert(1)</script>",
        rows=ROWS,
        tasks=TASKS,
        protocol="synthetic val split, 5 images, frame 48×64",
        figures=figures,
        extra={"seconds": 12, "<i>": "<u>"},
        gains=[None, 3.0],
    )
    text = path.read_text(encoding="utf-8")
    page = Page(text)
    assert page.open == [] and "script" not in page.tags and "u" not in page.tags
    words = page.words
    expected = ["Rooms & <script>alert(1)</script>", "synthetic val split, 5 images, frame 48×64", "trained <1>", "<u>"]
    assert set(expected) <= set(words)
    for number in ("3.51", "45.68", "1.2500", "0.4818", "+3.00", "81.25", "61.50", "29.86", "0.1000"):
        assert number in words, number
    assert words.count("no label") == 2
    assert "http" not in text
    assert len(page.images) == 2 * 4 + 4
    sources = [unquote(image["src"]) for image in page.images]
    assert len({source.casefold() for source in sources}) == len(sources)
    shades = []
    for source in sources:
        with Image.open(path.parent / source) as picture:
            assert picture.size == (20, 12)
            shades.append(int(np.asarray(picture)[0, 0, 0]))
    assert sorted(shades) == [7, 7, 50, 51, 52, 60, 61, 62, 70, 71, 72, 90]
    stem = "street_1_a_.jpg"
    assert {f"pictures/{stem}_depth_prediction.png", f"pictures/{stem}_depth_truth.png"} <= set(sources)


def test_report_without_figures_and_extra(tmp_path):
    page = Page(write_report(tmp_path, title="t", rows=ROWS, tasks=TASKS, protocol="p").read_text(encoding="utf-8"))
    assert page.images == [] and "Pictures" not in page.words


def test_figure_shows_the_image_and_comparable_pictures():
    pixels = np.random.default_rng(0).integers(0, 256, (3, 6, 8), dtype=np.uint8)
    depth = torch.linspace(1, 3, 48).reshape(1, 6, 8)
    depth[:, :2] = 0
    labels = {"depth": depth, "normals": torch.full((3, 6, 8), 255.0)}
    semseg = torch.zeros(2, 6, 8)
    semseg[1, :, 4:] = 1
    wrong = depth.clone()
    wrong[:, 5] = 9
    logits = {"semseg": semseg, "depth": wrong, "normals": torch.ones(3, 6, 8)}
    figure = figure_from(normalize(pixels), labels, logits, TASKS, "one")
    assert np.array_equal(figure.image, pixels.transpose(1, 2, 0))
    assert list(figure.predictions) == list(TASKS) and list(figure.truths) == ["depth"]
    assert np.all(figure.truths["depth"][:2] == 128)
    # the wrong prediction must not stretch the scale that it shares with the truth
    assert np.array_equal(figure.predictions["depth"][2:5], figure.truths["depth"][2:5])
    assert not np.array_equal(figure.predictions["depth"][5], figure.truths["depth"][5])
    assert figure.scales == {"depth": (float(depth[depth > 0].min()), 3.0)}
    colours = TASKS["semseg"].draw(np.array([[0, 1]], np.uint8))[0]
    assert np.array_equal(figure.predictions["semseg"][0, [0, 7]], colours)


def test_without_a_truth_the_scale_is_the_predictions():
    depth = torch.linspace(1, 3, 48).reshape(1, 6, 8)
    figure = figure_from(torch.zeros(3, 6, 8), {}, {"depth": depth}, {"depth": TASKS["depth"]}, "one")
    assert figure.scales == {"depth": (1.0, 3.0)} and figure.truths == {}


@pytest.mark.parametrize("unit", ["millimetre", "disparity"])
def test_a_bar_has_the_colours_of_the_map_from_end_to_end(unit):
    task = create_task("depth", unit=unit)
    values = np.array([[0.5, 2.0, 9.0]])
    bar = np.asarray(scale_bar(task, task.scale(values), 101))
    colours = task.draw(values)[0]
    assert np.array_equal(bar[0, [0, 100]], colours[[0, 2]])
    place = round((2.0 - 0.5) / (9.0 - 0.5) * 100)
    assert np.abs(bar[0, place].astype(int) - colours[1]).max() <= 6
    assert (bar[20:] < 100).any()  # the numbers


@pytest.mark.parametrize(
    ("scale", "text"), [((0.5, 9.0), "0.50 to 9.00 m"), ((0.001, 80.0), "0.0 to 80.0 m"), ((1.0, 655.0), "1 to 655 m")]
)
def test_the_range_of_a_scale_is_told_with_its_unit(scale, text):
    assert scale_text(create_task("depth"), scale) == text
    assert scale_text(create_task("depth", unit="disparity"), scale) == text.replace(" m", " px")


def test_metrics_are_headed_with_their_unit():
    titles = {
        ("depth", "RMSE"): "RMSE, m",
        ("depth", "abs_rel"): "abs_rel",
        ("depth", "delta_1.25"): "delta_1.25, %",
        ("normals", "median"): "median, °",
        ("semseg", "IoU/sky"): "IoU/sky, %",
        ("edge", "odsF"): "odsF, %",
        ("sal", "maxF"): "maxF, %",
    }
    assert {key: create_task(key[0]).titled(key[1]) for key in titles} == titles
    stereo = {"depth": create_task("depth", unit="disparity")}
    assert "depth RMSE, px ↓" in str(score_table([("a", {"depth": {"RMSE": 3.2}})], stereo))


@pytest.mark.parametrize("name", REGISTERED)
def test_every_score_has_a_unit(name):
    task = create_task(name)
    assert all(task.units.get(score) for score in (task.score, task.quick_score) if score)
