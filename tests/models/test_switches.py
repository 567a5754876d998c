"""What holds for the networks of all systems: one graph, recomputation with the same gradients, bfloat16, folded inference."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pamm.config.experiment import ExpertsConfig, ModelConfig, MTMambaConfig, ReleasedConfig
from pamm.models.model import MultiTaskModel
from pamm.models.registry import build_model
from pamm.tasks import create_task
from tiny import BACKBONE, DECODER, MTMAMBA, PEERS, SWIN

NAMES = ("semseg", "depth", "normals")
EXPERTS = ExpertsConfig(count=5, top_k=3, rank=2)
SYSTEMS = {
    "pamm": ModelConfig(BACKBONE, DECODER),
    "pamm-released": ModelConfig(BACKBONE, ReleasedConfig(width=32, state_size=4, experts=EXPERTS, kernel_size=3)),
    "mtmamba": ModelConfig(SWIN, MTMAMBA),
    "mtmamba++": ModelConfig(SWIN, MTMambaConfig("mtmamba++", state_size=4, head_width=8, window_size=3)),
    **PEERS,
}


@pytest.fixture(params=SYSTEMS)
def model(request) -> MultiTaskModel:
    torch.manual_seed(0)
    model = build_model(SYSTEMS[request.param], {name: create_task(name) for name in NAMES}, (64, 64))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
    return model.eval()


def image(batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def step(model: MultiTaskModel) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor | None]]:
    """Logits and gradients of a training step with the same random draws every time."""
    torch.manual_seed(7)
    logits = model.train()(image())
    sum(x.square().mean() for x in logits.values()).backward()
    return logits, {name: p.grad for name, p in model.named_parameters()}


def test_without_a_gradient_it_is_the_same_function(model):
    with torch.no_grad():
        folded = model(image())
    plain = model(image())
    for name in NAMES:
        assert (folded[name] - plain[name]).abs().max() <= 1e-5 * plain[name].abs().max(), name


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_the_forward_pass_is_one_graph(model, training):
    """What further tracing makes of it: test_compile.py."""
    model.train(training)
    torch._dynamo.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="eager", dynamic=False)
    with torch.set_grad_enabled(training):
        torch.manual_seed(3)
        expected = model(image())
        torch.manual_seed(3)
        found = compiled(image())
    for name in NAMES:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_recomputing_activations_changes_nothing_but_memory(model):
    again = copy.deepcopy(model)
    again.set_grad_checkpointing()
    for _ in range(2):  # the second step sees the running statistics that the first left
        logits, gradients = step(model)
        repeated, same = step(again)
    for name in NAMES:
        assert torch.equal(logits[name], repeated[name]), name
    for name, gradient in gradients.items():
        torch.testing.assert_close(same[name], gradient, rtol=1e-5, atol=1e-7)
    for (name, ours), other in zip(model.named_buffers(), again.buffers(), strict=True):
        assert torch.equal(ours, other), name


def kept_values(model: MultiTaskModel) -> int:
    """Values that a training step's forward pass keeps for its backward pass, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logits = model.train()(image())
    del logits
    return sum(kept.values())


def test_recomputing_keeps_less(model):
    before = kept_values(model)
    model.set_grad_checkpointing()
    assert kept_values(model) < 0.5 * before


def test_bfloat16_is_close_and_equals_the_autocast(model):
    with torch.no_grad():
        exact = model(image())
        with torch.autocast("cpu", torch.bfloat16):
            cast_each_time = model(image())
        model.use_half_precision()
        rough = model(image())
    for name in NAMES:
        assert rough[name].dtype == torch.float32
        assert (exact[name] - rough[name]).abs().max() < 0.1 * exact[name].abs().max(), name
        assert (cast_each_time[name] - rough[name]).abs().max() < 0.03 * exact[name].abs().max(), name
    parameters = dict(model.named_parameters())
    assert all(p.dtype == torch.float32 for name, p in parameters.items() if name.endswith(("A_log", ".D", "prior")))
    halved = sum(p.numel() for p in parameters.values() if p.dtype == torch.bfloat16)
    assert halved > 0.5 * sum(p.numel() for p in parameters.values())
