"""A network made ready for inference."""

from __future__ import annotations

import torch

from pamm.kernels.rewrites import Choice, apply_choice
from pamm.models.model import MultiTaskModel
from pamm.runtime.precision import choose_precision


def prepare(
    model: MultiTaskModel,
    *,
    precision: str = "fp32",
    compile: bool = False,  # noqa: A002
    kernels: Choice = "auto",
) -> MultiTaskModel:
    """The model itself, made ready for inference in this arithmetic.

    kernels: "auto" puts faster modules in the place of its own (see `pamm.accelerate`), "off" leaves them.
    compile: let torch.compile fuse what surrounds the matrix products. It takes a minute or more at the first image, and
    again for every other size. Raises ConfigError.
    """
    apply_choice(model, kernels, training=False)
    dtype = choose_precision(precision, next(model.parameters()).device)
    if dtype != torch.float32:
        model.use_half_precision(dtype)
    if compile:
        model.compile(dynamic=False)
    return model
