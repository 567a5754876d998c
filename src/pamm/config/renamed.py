"""Earlier names of settings → today's, so that files of earlier versions load: saved models, run folders, users' yaml.

This file imports no torch.
"""

from __future__ import annotations

from typing import Any

from pamm.config.strict import ConfigError, check_choice

RENAMED: dict[str, str] = {
    "model.backbone.taps": "out_indices",
    "model.backbone.drop_path": "drop_path_rate",
    "model.backbone.patch": "patch_size",
    "model.backbone.width": "embed_dim",
    "model.backbone.heads": "num_heads",
    "model.backbone.stage_heads": "num_heads",
    "model.backbone.stage_depths": "depths",
    "model.backbone.window": "window_size",
    "model.decoder.drop_path": "drop_path_rate",
    "model.decoder.window": "window_size",
    "model.decoder.kernel": "kernel_size",
    "train.recompute": "grad_checkpointing",
    "train.accelerator": "device",
}
"""Earlier path of a leaf → its name now, beside the same leaves."""

PRECISIONS = ("fp32", "bf16", "fp16", "auto")
"""Arithmetic of matrix products and convolutions. auto: bf16 on a CPU with units for it (see `pamm doctor`), else fp32."""

EARLIER_PRECISIONS = {
    "float32": "fp32",
    "32-true": "fp32",
    "32": "fp32",
    "bfloat16": "bf16",
    "bf16-mixed": "bf16",
    "float16": "fp16",
    "16-mixed": "fp16",
}
"""Earlier word for a precision, or torch's or Lightning's → ours."""


def precision_name(given: str) -> str:
    """The precision that a word means. Raises ConfigError for one that means none."""
    return check_choice("precision", EARLIER_PRECISIONS.get(given, given), PRECISIONS)


def with_new_names(values: Any, where: str = "") -> Any:
    """The same tree of settings under today's names. What has none of the earlier names is returned as it is.

    Args:
        values: plain values of an experiment, or of the part of it that `where` names, e.g. "model.".
        where: path of `values` in an experiment, with a dot at its end.

    Raises:
        ConfigError: a leaf is given twice, by its earlier name and by today's.
    """
    if not isinstance(values, dict):
        return values
    renamed: dict[Any, Any] = {}
    for key, value in values.items():
        path = f"{where}{key}"
        name = RENAMED.get(path, key)
        if name != key and value is None:  # in an earlier version every leaf stood in a file, set or not
            continue
        if name in renamed or (name != key and name in values):
            raise ConfigError(f"{path} is an earlier name of {where}{name}, which is given too; keep one of the two")
        if path == "model.backbone.taps" and isinstance(value, list):  # they were counted from 1
            value = [tap - 1 if type(tap) is int else tap for tap in value]
        renamed[name] = with_new_names(value, f"{path}.")
    return renamed
