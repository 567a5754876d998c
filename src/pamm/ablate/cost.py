"""Parameters and arithmetic of a network, counted without computing anything."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from pamm.config.experiment import Experiment
from pamm.kernels import conv_head, mixed_convolution
from pamm.models.registry import build_model
from pamm.nn.replace import replace_modules
from pamm.ops.compiled import torch_alone
from pamm.ops.selective_scan import VARIABLE
from pamm.tasks import Task

PER_STATE_STEP = 9
"""Multiply-adds counted for one state at one position of one scan order, as the published counts of Mamba networks do."""


class Cost(NamedTuple):
    """The parameters of a network, and its multiply-adds for one image."""

    parameters: int
    multiply_adds: int
    """Of matrix products and convolutions, and of the selective scans; norms, activations and interpolations are left out."""


def count_cost(experiment: Experiment, tasks: dict[str, Task]) -> Cost:
    """Count the parameters and multiply-adds of a network on one image of `data.size`. The weights take no memory.

    Args:
        experiment: the experiment.
        tasks: its tasks.

    Returns:
        The counts.
    """
    model = replace(experiment.model, backbone=replace(experiment.model.backbone, pretrained=False))
    network = build_model(model, tasks, experiment.data.size, "meta").eval()
    with torch.device("meta"):
        for rewrite in (conv_head, mixed_convolution):  # what a prediction computes is counted, in torch
            replace_modules(network, rewrite.replacement)
    counter = FlopCounterMode(display=False, custom_mapping={torch.ops.pamm.selective_scan: _scan_flops})
    with _own_engine(), torch_alone(), FakeTensorMode(), counter, torch.no_grad():
        stored = [*network.named_parameters(), *network.named_buffers()]
        tensors = {name: torch.empty(tensor.shape, dtype=tensor.dtype) for name, tensor in stored}
        functional_call(network, tensors, (torch.empty(1, 3, *experiment.data.size),))
    return Cost(sum(parameter.numel() for parameter in network.parameters()), counter.get_total_flops() // 2)


@contextmanager
def _own_engine() -> Iterator[None]:
    """Leave the choice of a scan engine aside: another need not run here, or not be one node of the graph."""
    before = os.environ.pop(VARIABLE, None)
    try:
        yield
    finally:
        if before is not None:
            os.environ[VARIABLE] = before


def _scan_flops(x: tuple, delta: tuple, A: tuple, B: tuple, C: tuple, D: tuple, bias: tuple, orders: tuple, *_, **__):
    groups, images, length, channels = x
    return 2 * PER_STATE_STEP * groups * images * length * channels * A[-1] * orders[0]
