"""What a prediction writes as labels is a folder data set again, in the unit of that folder."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from pamm.config.experiment import DataConfig
from pamm.data import dataset_options, open_dataset
from pamm.prediction import Maps
from pamm.tasks import create_task

PIXELS = np.zeros((6, 8, 3), np.uint8)
FAR = np.linspace(0.4, 90, 48, dtype=np.float32).reshape(6, 8)


@pytest.mark.parametrize("unit", ["metre", "millimetre", 256])
def test_predicted_labels_are_read_in_the_unit_of_their_folder(tmp_path, unit):
    (tmp_path / "train/images").mkdir(parents=True)
    tasks = {"depth": create_task("depth", unit=unit), "sal": create_task("sal"), "edge": create_task("edge")}
    maps = {"depth": FAR, "sal": FAR / 90, "edge": FAR / 90}
    near = maps | {"depth": FAR / 90}
    predictions = tmp_path / "predictions"
    for depths in (near, maps, near, maps):  # the files of each replace the last one's, whatever their suffix
        written = Maps(PIXELS, depths, tasks).save(predictions, stem="a.b", formats=["png"])
        assert sorted(written) == sorted(p for p in predictions.rglob("*") if p.is_file())
    for name in tasks:
        (predictions / name).rename(tmp_path / "train" / name)
    Image.fromarray(PIXELS).save(tmp_path / "train/images/a.b.png")
    (tmp_path / "dataset.yaml").write_text(f"tasks: {{depth: {{unit: {unit}}}, sal: {{}}, edge: {{}}}}")
    config = DataConfig(name="folder", root=str(tmp_path))
    own = {name: create_task(name, **options) for name, options in dataset_options(config).items()}
    labels = open_dataset(config, "train", own)[0].labels
    np.testing.assert_allclose(labels["depth"][0], FAR, atol=0.003)
    for name in ("sal", "edge"):
        np.testing.assert_array_equal(labels[name][0], FAR >= 45)
