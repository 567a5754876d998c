"""Settings under the names of earlier versions: yaml of users and run folders, config.json of saved models, options."""

from __future__ import annotations

from dataclasses import replace

import pytest
import yaml

from pamm.command_line import parse_experiment
from pamm.config.experiment import BackboneConfig, ConfigError, MTMambaConfig, ReleasedConfig, load

EARLIER = """
model:
  backbone:
    name: vit_tiny_patch16_224
    taps: [2, 4]
    drop_path: 0.25
    patch: 8
    width: 128
    depth: 4
    heads: 2
    stage_depths: null
    stage_heads: null
    window: null
  decoder: {system: pamm-released, kernel: 5}
train: {recompute: true, accelerator: cpu}
"""

EARLIER_SWIN = """
model:
  backbone: {taps: [1, 2, 3], width: 32, heads: null, stage_depths: [2, 2, 2], stage_heads: [1, 2, 4], window: 8}
  decoder: {system: mtmamba, drop_path: 0.5, window: 12}
"""


@pytest.fixture
def written(tmp_path):
    """Text → the path of a yaml file that holds it."""

    def write(text: str):
        path = tmp_path / "experiment.yaml"
        path.write_text(text)
        return path

    return write


def test_earlier_names_are_todays(written):
    found = load(written(EARLIER))
    backbone = BackboneConfig("vit_tiny_patch16_224", True, (1, 3), 0.25, 8, 128, depth=4, num_heads=2)
    assert found.model.backbone == backbone
    assert found.model.decoder == ReleasedConfig(kernel_size=5)
    assert found.train.grad_checkpointing and found.train.device == "cpu"


def test_earlier_names_of_a_swin_are_todays(written):
    found = load(written(EARLIER_SWIN)).model
    sizes = {"embed_dim": 32, "depths": (2, 2, 2), "num_heads": (1, 2, 4), "window_size": 8}
    assert found.backbone == replace(BackboneConfig(), out_indices=(0, 1, 2), **sizes)
    assert found.decoder == MTMambaConfig(drop_path_rate=0.5, window_size=12)


@pytest.mark.parametrize(
    "both", [{"heads": 2, "num_heads": 4}, {"num_heads": 4, "heads": 2}, {"heads": 2, "stage_heads": [2, 2]}]
)
def test_a_leaf_given_by_both_names_is_told(both, written):
    text = yaml.safe_dump({"model": {"backbone": both}}, sort_keys=False)
    with pytest.raises(ConfigError, match=r"earlier name of model\.backbone\.num_heads, which is given too"):
        load(written(text))


def test_what_was_wrong_under_an_earlier_name_is_told_under_todays(written):
    with pytest.raises(ConfigError, match=r"model\.backbone\.out_indices: found 'all'"):
        load(written("model: {backbone: {taps: all}}"))


def test_earlier_names_of_options_are_taken():
    experiment, _ = parse_experiment("train", ["demo", "--train.recompute", "True", "--model.backbone.drop-path=0.5"])
    assert experiment.train.grad_checkpointing and experiment.model.backbone.drop_path_rate == 0.5
    with pytest.raises(ConfigError, match=r"called --model\.backbone\.out_indices now.*counted from 0"):
        parse_experiment("train", ["demo", "--model.backbone.taps", "2", "4"])
