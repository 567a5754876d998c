"""The networks under torch.compile: one graph, the same outputs and gradients."""

from __future__ import annotations

import shutil

import pytest
import torch
from torch._inductor import config as inductor

from pamm.config.experiment import ModelConfig
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER, MTMAMBA, SWIN

CASES = {
    "pamm": (ModelConfig(BACKBONE, DECODER), (48, 64), "inductor"),
    "mtmamba": (ModelConfig(SWIN, MTMAMBA), (64, 96), "aot_eager"),  # inductor compiles its 1200 operations for minutes
}
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of the tensor."""


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_compiled_training_step_equals_the_eager_one(name):
    config, size, backend = CASES[name]
    if backend == "inductor" and not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("inductor needs a C++ compiler")
    torch.manual_seed(0)
    model = build_model(config, {task: create_task(task) for task in ("semseg", "depth")}, size).train()
    image, start = torch.randn(2, 3, *size), {key: value.clone() for key, value in model.state_dict().items()}

    def step(call):
        model.load_state_dict(start)
        model.zero_grad()
        torch.manual_seed(1)
        outputs = call(image)
        generator = torch.Generator().manual_seed(2)
        sum((y * torch.randn(y.shape, generator=generator)).sum() for y in outputs.values()).backward()
        gradients = {f"d{key}": value.grad for key, value in model.named_parameters()}
        return {key: value.detach().clone() for key, value in {**outputs, **gradients}.items()}

    expected = step(model)
    with inductor.patch(fallback_random=True):  # torch's own random numbers, as the eager step draws them
        found = step(torch.compile(model, backend=backend, fullgraph=True))
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        error = (found[key] - value).abs().max() / value.abs().max()
        assert error < TOLERANCE, f"{key}: relative difference {error:.1e}"
