"""`pamm boundary`: folders of maps against the reference benchmark's counts, every kind of file, and what a user can get wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.io import savemat
from scipy.sparse import csc_array

from command import run_command
from pamm.evaluation.boundaries import BoundaryError
from pamm.evaluation.boundaries.measure import COUNTS, measure_folders
from pamm.tasks.boundary import PROTOCOLS, counts
from pamm.tasks.metrics.images import processes

# -- against the reference ---------------------------------------------------------------------------------------------


def measure_reference(folder: Path, ids: Path | None = None) -> tuple[dict, np.ndarray, np.ndarray]:
    """The scores, and ours and the reference's counts, (images, 4, 99) each. The maps were suppressed already."""
    rule = {"protocol": "bsds", "suppressed": True, "workers": processes()}
    found = measure_folders(folder / "hed", folder / "groundTruth", ids=ids, **rule)
    theirs = [np.loadtxt(folder / "hed_counts" / f"{name}_ev1.txt")[:, 1:].T for name in found.counts]
    return found.scores(), np.array(list(found.counts.values())), np.array(theirs)


def assert_counts_agree(ours: np.ndarray, theirs: np.ndarray) -> None:
    """Sums of pixels at every threshold; matched pixels of each image within 0.3 % (recall) and 1 % (precision)."""
    np.testing.assert_array_equal(ours[:, [1, 3]], theirs[:, [1, 3]])
    np.testing.assert_allclose(ours[:, 0].sum(1), theirs[:, 0].sum(1), rtol=0.003)
    np.testing.assert_allclose(ours[:, 2].sum(1), theirs[:, 2].sum(1), rtol=0.01)


def test_counts_of_three_images_agree_with_the_reference(shared, tmp_path) -> None:
    """Among them the two whose matched pixels differ most of all 200."""
    (tmp_path / "ids.txt").write_text("69000\n112056\n2018\n")
    _, ours, theirs = measure_reference(shared / "data" / "boundary_reference", tmp_path / "ids.txt")
    assert ours.shape == (3, 4, 99)
    assert_counts_agree(ours, theirs)


@pytest.mark.exhaustive
def test_counts_and_scores_of_all_images_agree_with_the_reference(shared) -> None:
    folder = shared / "data" / "boundary_reference"
    scores, ours, theirs = measure_reference(folder)
    assert len(ours) == 200
    assert_counts_agree(ours, theirs)
    np.testing.assert_allclose(ours[:, ::2].sum((0, 2)), theirs[:, ::2].sum((0, 2)), rtol=0.001)
    threshold, _, _, ods, _, _, ois, ap = np.loadtxt(folder / "hed_counts" / "eval_bdry.txt")
    assert scores["ODS"]["threshold"] == threshold
    assert (scores["ODS"]["F"], scores["OIS"]["F"], scores["AP"]) == pytest.approx((ods, ois, ap), abs=0.001)


# -- files ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def folders(tmp_path) -> tuple[Path, Path]:
    """Three small maps as 8-bit PNG and their truths as PNG."""
    maps, truths = tmp_path / "maps", tmp_path / "truths"
    maps.mkdir()
    truths.mkdir()
    for seed, name in enumerate(("a", "b", "c")):
        probability, lines = example(seed)
        Image.fromarray(probability).save(maps / f"{name}.png")
        Image.fromarray(lines * np.uint8(255)).save(truths / f"{name}.png")
    return maps, truths


def example(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A map (40, 50) uint8 with a line and clutter, and the bool truth: a line beside it."""
    generator = np.random.default_rng(seed)
    probability = (generator.random((40, 50)) ** 4 * 120).astype(np.uint8)
    probability[20 + seed, 5:45] = generator.integers(100, 256, 40)
    lines = np.zeros((40, 50), bool)
    lines[21 + seed, 8:48] = True
    return probability, lines


def test_scores_are_those_of_the_counts_and_workers_do_not_matter(folders) -> None:
    rule = PROTOCOLS["bdet"]
    levels = np.nextafter(rule.thresholds, 2)
    expected = [counts(p / 255, [t], thresholds=levels, max_distance=0.03, nms=1) for p, t in map(example, range(3))]
    one, two = (measure_folders(*folders, max_distance=0.03, workers=workers) for workers in (1, 2))
    assert list(one.counts) == list(two.counts) == ["a", "b", "c"]
    for found, again, known in zip(one.counts.values(), two.counts.values(), expected, strict=True):
        np.testing.assert_array_equal(found, known)
        np.testing.assert_array_equal(again, known)
    recall, precision = (np.sum(expected, 0)[i] / np.maximum(np.sum(expected, 0)[i + 1], 1) for i in (0, 2))
    f = 2 * recall * precision / np.maximum(recall + precision, 1e-12)
    ods = one.scores()["ODS"]
    assert ods["F"] == pytest.approx(f.max(), rel=1e-12) and ods["threshold"] == rule.thresholds[f.argmax()]
    assert one.scores()["OIS"]["F"] >= ods["F"] > 0.5


def test_every_kind_of_file_gives_the_same_counts(folders, tmp_path) -> None:
    maps, truths = folders
    expected = measure_folders(maps, truths, protocol="bsds", max_distance=0.03).counts
    kinds = [
        (folder, tmp_path / name)
        for folder, name in ((maps, "maps16"), (maps, "npy"), (truths, "mat"), (truths, "stack"))
    ]
    for folder, other in kinds:
        other.mkdir()
        for path in folder.iterdir():
            values = np.asarray(Image.open(path))
            if other.name == "maps16":
                Image.fromarray(values.astype(np.uint16) * 257).save(other / path.name)
            elif other.name == "npy":
                np.save(other / f"{path.stem}.npy", values / 255)
            elif other.name == "stack":
                np.save(other / f"{path.stem}.npy", values[None] > 0)
            else:
                save_bsds(other / f"{path.stem}.mat", [values > 0])
    for given in ((tmp_path / "maps16", tmp_path / "mat"), (tmp_path / "npy", tmp_path / "stack")):
        found = measure_folders(*given, protocol="bsds", max_distance=0.03).counts
        for name, known in expected.items():
            np.testing.assert_array_equal(found[name], known)


def save_bsds(path: Path, lines: list[np.ndarray]) -> None:
    """A groundTruth file as BSDS has them: a cell array of structs."""
    cells = np.empty((1, len(lines)), object)
    for place, line in enumerate(lines):
        cells[0, place] = {"Segmentation": line.astype(np.uint16), "Boundaries": line.astype(np.uint8)}
    savemat(path, {"groundTruth": cells})


def test_annotators_of_one_file_all_count(folders, tmp_path) -> None:
    maps, _ = folders
    (tmp_path / "mat").mkdir()
    for seed, name in enumerate("abc"):
        line = example(seed)[1]
        save_bsds(tmp_path / "mat" / f"{name}.mat", [line, np.roll(line, 1, 0), np.roll(line, -15, 0)])
    found = measure_folders(maps, tmp_path / "mat", protocol="bsds", max_distance=0.03)
    assert found.total[1].tolist() == [3 * 3 * 40] * 99
    assert (found.total[2] <= found.total[0]).all() and (found.total[2] < found.total[0]).any()


def test_the_outline_of_a_label_map_is_the_truth_where_asked_for(tmp_path) -> None:
    for name in ("maps", "labels"):
        (tmp_path / name).mkdir()
    labels = np.kron(np.array([[3, 7], [7, 12]], np.uint8), np.ones((30, 30), np.uint8))
    probability = np.zeros((60, 60), np.uint8)
    probability[29:31] = probability[:, 29:31] = 200
    Image.fromarray(labels).save(tmp_path / "labels" / "a.png")
    Image.fromarray(probability).save(tmp_path / "maps" / "a.png")
    given = (tmp_path / "maps", tmp_path / "labels")
    assert measure_folders(*given, max_distance=0.02, outline=True).scores()["ODS"]["F"] > 0.95
    with pytest.raises(BoundaryError, match=r"holds the values 3, 7, 12, expected 0 and one other .* give --outline"):
        measure_folders(*given)


def inverted(folder: Path, new: Path, suffix: str = ".png") -> Path:
    """The pictures of a folder with dark and light exchanged, as PNG or as floating point."""
    new.mkdir()
    for path in folder.iterdir():
        values = 255 - np.asarray(Image.open(path))
        if suffix == ".png":
            Image.fromarray(values).save(new / path.name)
        else:
            np.save(new / f"{path.stem}.npy", values / 255)
    return new


@pytest.mark.parametrize("suffix", [".png", ".npy"])
def test_inverted_maps_are_refused_and_measured_where_said(folders, tmp_path, suffix, capsys) -> None:
    maps, truths = folders
    dark = inverted(maps, tmp_path / "dark", suffix)
    text = told(capsys, dark, truths)
    assert "3 of 3 maps say of most pixels that they are boundaries" in text and "give --invert-maps" in text
    assert "leave out --invert-maps" in told(capsys, maps, truths, "--invert-maps")
    expected = measure_folders(maps, truths, max_distance=0.03)
    found = measure_folders(dark, truths, max_distance=0.03, invert_maps=True)
    assert found.scores()["ODS"]["F"] == pytest.approx(expected.scores()["ODS"]["F"], abs=0.01)
    assert found.notes() == expected.notes() == []


def test_inverted_truths_are_refused_and_measured_where_said(folders, tmp_path, capsys) -> None:
    maps, truths = folders
    dark = inverted(truths, tmp_path / "dark")
    assert re.search(r"a\.png has lines on 98 % .*dark lines on white give --invert-truths", told(capsys, maps, dark))
    assert "leave out --invert-truths" in told(capsys, maps, truths, "--invert-truths")
    expected = measure_folders(maps, truths, max_distance=0.03).counts
    found = measure_folders(maps, dark, max_distance=0.03, invert_truths=True).counts
    assert all((found[name] == expected[name]).all() for name in expected)
    (tmp_path / "mat").mkdir()
    for seed, name in enumerate("abc"):
        save_bsds(tmp_path / "mat" / f"{name}.mat", [~example(seed)[1]])
    assert "give --invert-truths" in told(capsys, maps, tmp_path / "mat")
    found = measure_folders(maps, tmp_path / "mat", max_distance=0.03, invert_truths=True).counts
    assert all((found[name] == expected[name]).all() for name in expected)


def test_a_mask_is_no_line_but_has_an_outline(folders, capsys) -> None:
    maps, truths = folders
    mask = np.zeros((40, 50), np.uint8)
    mask[8:32, 10:40] = 255
    Image.fromarray(mask).save(truths / "b.png")
    text = told(capsys, maps, truths)
    assert re.search(r"b\.png holds regions, \d+ pixels wide on average, .*give --outline", text), text
    thick = np.zeros((40, 50), np.uint8)
    thick[20:26, 5:45] = 255
    Image.fromarray(thick).save(truths / "b.png")
    assert measure_folders(maps, truths).counts["b"][1, 0] > 20


def test_odd_files_are_told_beside_the_scores(folders, capsys) -> None:
    maps, truths = folders
    Image.fromarray(255 - np.asarray(Image.open(maps / "a.png"))).save(maps / "a.png")
    for path in (maps / "b.png", truths / "c.png"):
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(path)
    text = told(capsys, maps, truths, code=0)
    for line in (
        "1 of 3 maps are boundaries on most pixels",
        "1 of 3 maps are 0 everywhere: b",
        "truths have no line: c",
    ):
        assert line in text
    for name in "ab":
        Image.fromarray(np.zeros((40, 50), np.uint8)).save(truths / f"{name}.png")
    assert "none of the 3 truths" in told(capsys, maps, truths)


# -- the command ---------------------------------------------------------------------------------------------------------


def told(capsys, *arguments: object, code: int = 1) -> str:
    """Run `pamm boundary`, expect an exit code; returns what it said."""
    return run_command(capsys, "boundary", *arguments, code=code)


def test_the_command_prints_scores_and_writes_all_counts(folders, tmp_path, capsys) -> None:
    out = tmp_path / "results" / "scores.json"
    text = told(capsys, *folders, "--max-distance", 0.03, "--out", out, code=0)
    found = measure_folders(*folders, max_distance=0.03)
    assert f"ODS {found.scores()['ODS']['F']:.4f}" in text and "3 images, protocol bdet" in text
    written = json.loads(out.read_text())
    assert written["thresholds"] == list(PROTOCOLS["bdet"].thresholds)
    assert {key: written[key] for key in ("ODS", "OIS", "AP")} == found.scores()
    np.testing.assert_array_equal([written["per_image"]["b"][key] for key in COUNTS], found.counts["b"])
    np.testing.assert_array_equal([written["total"][key] for key in COUNTS], found.total)


def test_a_list_chooses_the_images(folders, tmp_path, capsys) -> None:
    (folders[0] / "b.png").unlink()
    assert "holds no map for 1 of 3 images: b; add them, or list the names" in told(capsys, *folders)
    (tmp_path / "ids.txt").write_text("c\na\n")
    assert "2 images" in told(capsys, *folders, "--ids", tmp_path / "ids.txt", code=0)
    (tmp_path / "ids.txt").write_text("c\nb\n")
    assert "holds no map for 1 of 2 images: b" in told(capsys, *folders, "--ids", tmp_path / "ids.txt")


def write_array(path: Path, values: np.ndarray, **options: object) -> None:
    path.with_suffix(".png").unlink()
    np.save(path.with_suffix(".npy"), values, **options)


def write_archive(path: Path) -> None:
    path.with_suffix(".png").unlink()
    with path.with_suffix(".npy").open("wb") as file:
        np.savez(file, np.ones((40, 50)))


def replace_truth(path: Path, **content: object) -> None:
    path.with_suffix(".png").unlink()
    savemat(path.with_suffix(".mat"), content)


def write_header(path: Path) -> None:
    """The first bytes of a file of MATLAB 7.3, and zeros."""
    path.with_suffix(".png").unlink()
    text = b"MATLAB 7.3 MAT-file, Platform: GLNXA64".ljust(124)
    path.with_suffix(".mat").write_bytes(text + bytes([0, 2]) + b"IM" + bytes(400))


def write_text(path: Path, suffix: str, text: str) -> None:
    path.with_suffix(".png").unlink()
    path.with_suffix(suffix).write_text(text)


MISTAKES = {
    "size": (
        lambda m, t: Image.fromarray(np.zeros((50, 40), np.uint8)).save(m),
        r"maps/a\.png has 50 x 40 .*turn the map",
    ),
    "padded": (lambda m, t: Image.fromarray(np.zeros((48, 64), np.uint8)).save(m), "has 48 x 64 .* without padding"),
    "colour": (
        lambda m, t: Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(m),
        r"maps/a\.png is an 8-bit RGB PNG, expected a grey map",
    ),
    "0 and 1": (
        lambda m, t: Image.fromarray(np.eye(40, 50, dtype=np.uint8)).save(m),
        "values up to 1 only, expected 0 to 255",
    ),
    "logits": (
        lambda m, t: write_array(m, np.full((40, 50), -3.5)),
        r"values from -3\.5 to -3\.5, expected probabilities",
    ),
    "nan": (lambda m, t: write_array(m, np.full((40, 50), np.nan)), "values from nan"),
    "levels": (lambda m, t: write_array(m, np.ones((40, 50), np.uint8)), "uint8 values .* floating point"),
    "batch": (lambda m, t: write_array(m, np.ones((1, 40, 50))), r"shape \(1, 40, 50\), expected \(H, W\)"),
    "objects": (
        lambda m, t: write_array(m, np.array([[print]]), allow_pickle=True),
        r"a\.npy is no whole NumPy file of plain arrays",
    ),
    "archive": (lambda m, t: write_archive(m), r"a\.npy is no whole NumPy file .*an archive of arrays \(\.npz\)"),
    "truncated": (lambda m, t: m.write_bytes(m.read_bytes()[:90]), "not a whole picture.*Expected a grey map"),
    "labels": (lambda m, t: Image.fromarray(example(0)[0]).save(t), "give --outline"),
    "no groundTruth": (
        lambda m, t: replace_truth(t, LabelMap=np.ones((40, 50))),
        r"a\.mat has no cell array 'groundTruth'",
    ),
    "plain truth": (
        lambda m, t: replace_truth(t, groundTruth=np.ones((40, 50))),
        r"a\.mat has no cell array 'groundTruth'",
    ),
    "sparse truth": (
        lambda m, t: replace_truth(t, groundTruth=np.array([[{"Boundaries": csc_array(np.eye(40, 50))}]], object)),
        r"a\.mat is no whole MATLAB file .*it holds a sparse matrix",
    ),
    "nested truth": (
        lambda m, t: replace_truth(t, groundTruth=np.array([[{"Boundaries": np.array([{"a": 1}])}]], object)),
        r"a\.mat has no cell array 'groundTruth'",
    ),
    "MATLAB 7.3": (
        lambda m, t: write_header(t),
        r"a\.mat is no whole MATLAB file .*it is of version 7\.3 \(HDF5\); in MATLAB, .* -v7",
    ),
    "foreign mat": (lambda m, t: write_text(t, ".mat", "hello" * 99), r"a\.mat is no whole MATLAB file"),
    "two of a name": (lambda m, t: np.save(m.with_suffix(".npy"), np.ones((40, 50))), r"holds both a\.npy and a\.png"),
}


@pytest.mark.parametrize("kind", MISTAKES)
def test_a_mistake_is_told_with_its_remedy(folders, kind, capsys) -> None:
    damage, message = MISTAKES[kind]
    damage(folders[0] / "a.png", folders[1] / "a.png")
    text = told(capsys, *folders, "--workers", 2)
    assert re.search(message, text), text


def test_wrong_folders_and_options_are_told(folders, tmp_path, capsys) -> None:
    maps, truths = folders
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "z.png").write_bytes((maps / "a.png").read_bytes())
    for arguments, message in (
        ((maps, tmp_path / "nowhere"), f"no folder {tmp_path / 'nowhere'}"),
        ((tmp_path / "empty", truths), "holds no .png, .npy file"),
        ((tmp_path / "other", truths), "no map and truth have a name in common"),
        ((maps, truths, "--max-distance", 4.7), "max_distance is 4.7, expected a fraction"),
        ((maps, truths, "--out", tmp_path), "is a folder, expected the path of a JSON file"),
        ((maps, truths, "--ids", tmp_path / "none.txt"), "none.txt"),
    ):
        assert message in told(capsys, *arguments)
    assert "found '0', expected a whole number from 1 up" in told(capsys, maps, truths, "--workers", 0, code=2)
