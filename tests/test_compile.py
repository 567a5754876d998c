"""The networks under torch.compile: one graph, the same outputs and gradients."""

from __future__ import annotations

import shutil
from dataclasses import replace

import pytest
import torch
from torch._inductor import config as inductor

from pamm.config.experiment import ExpertsConfig, ModelConfig, ReleasedConfig
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER, MTMAMBA, SWIN

VIT = replace(BACKBONE, depth=1, out_indices=(0,))
EXPERTS = ExpertsConfig(count=3, top_k=2, rank=2)
CASES = {
    "pamm": (ModelConfig(VIT, replace(DECODER, experts=EXPERTS)), (48, 64)),
    "pamm-released": (ModelConfig(VIT, ReleasedConfig(32, state_size=4, experts=EXPERTS, kernel_size=3)), (48, 64)),
    "mtmamba": (ModelConfig(replace(SWIN, depths=(1, 1, 1, 1)), replace(MTMAMBA, stm=1)), (64, 96)),
}
TOLERANCE = 1e-4
"""Largest difference, relative to the largest value of the tensor (some gradients are rounding noise)."""


@pytest.mark.parametrize(
    ("name", "backend"),
    [
        *(pytest.param(name, "aot_eager", marks=pytest.mark.slow) for name in CASES),
        pytest.param("pamm", "inductor", marks=pytest.mark.exhaustive),  # a minute for its C++ compiler
    ],
)
def test_compiled_training_step_equals_the_eager_one(name, backend):
    config, size = CASES[name]
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
        return {key: value.detach().clone() for key, value in {**outputs, **gradients}.items() if value is not None}

    expected = step(model)
    with inductor.patch(fallback_random=True):  # torch's own random numbers, as the eager step draws them
        found = step(torch.compile(model, backend=backend, fullgraph=True))
    assert found.keys() == expected.keys()
    largest = max(value.abs().max() for value in expected.values())
    for key, value in expected.items():
        error = (found[key] - value).abs().max()
        assert error <= TOLERANCE * value.abs().max() + 1e-6 * largest, f"{key}: difference {error:.1e}"
