"""The released PAMM's decoder and heads in plain form: one task after another, one expert after another, large maps.

The same function as `pamm.models.pamm_released`, in eval mode, written as the published description reads and on the same
weights (under the published checkpoints' names), so that the cost of the rewrites can be measured in one process.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from pamm.models.model import MultiTaskModel, resize
from pamm.nn.serialize import scan_orders
from pamm.official.pamm import STAGE, table
from speed.plain_scan import Parts, Scan

GROUPS, TOP_K, HEAD_SCALE = 32, 9, 4
DEAD_KERNEL, DEAD_RANK = 3, 16
"""Kernel and rank of the experts whose output the published code computes and throws away."""


class Weights:
    """Tensors under a common prefix, and the layers made of them."""

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = ""):
        self.tensors, self.prefix = tensors, prefix

    def under(self, name: str) -> Weights:
        return Weights(self.tensors, f"{self.prefix}{name}.")

    def get(self, name: str) -> Tensor | None:
        return self.tensors.get(self.prefix + name)

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[self.prefix + name]

    def conv(self, name: str, x: Tensor) -> Tensor:
        """A convolution that keeps the map's size; 1×1 where the weight is a matrix."""
        weight = self[f"{name}.weight"]
        weight = weight[:, :, None, None] if weight.dim() == 2 else weight
        return F.conv2d(x, weight, self.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self[f"{name}.weight"].flatten(1), self.get(f"{name}.bias"))

    def group_norm(self, name: str, x: Tensor) -> Tensor:
        return F.group_norm(x, GROUPS, self[f"{name}.weight"], self[f"{name}.bias"])

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        weight = self[f"{name}.weight"]
        return F.layer_norm(x, weight.shape, weight, self[f"{name}.bias"])

    def batch_norm(self, name: str, x: Tensor) -> Tensor:
        own = self.under(name)
        return F.batch_norm(x, own["running_mean"], own["running_var"], own["weight"], own["bias"])


def published_weights(model: MultiTaskModel) -> dict[str, Tensor]:
    """The decoder's and heads' tensors of a built released PAMM under the published names; they share its memory."""
    own = {name: value for name, value in model.state_dict().items() if not name.startswith("backbone.")}
    places = table(model.state_dict(), list(model.tasks))
    return {key: torch.atleast_1d(place.collect(own)).contiguous() for key, place in places.items() if place.own in own}


def route(weights: Weights, x: Tensor, experts: int) -> tuple[Tensor, Tensor]:
    """(B, e, h, w) → the experts' weights (B, E), all but the k largest zero, and the mix (B, 1)."""
    own = weights.under("0")
    hidden = own.layer_norm("ln", own.conv("conv1", x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    channel = own.conv("conv3", F.gelu(hidden)).mean((2, 3))
    positions = F.linear(x.flatten(2), own["convsp.weight"].reshape(1, -1), own["convsp.bias"])  # (B, e, 1)
    spatial = own.linear("conv2", F.gelu(own.layer_norm("ln_sp", positions[..., 0])))
    scores = weights.linear("1", torch.cat([channel, spatial], dim=1)).float()
    p = scores[:, :experts].softmax(1)
    for row in range(len(p)):
        for expert in p[row].argsort(descending=True)[TOP_K:].tolist():
            p[row, expert] = 0.0
    return p, scores[:, 2 * experts :]


def run_experts(weights: Weights, task: str, x: Tensor) -> Tensor:
    """One task's parameter, (B, e, h, w) → (B, N, h, w): every expert evaluated, whatever its weight."""
    count = next(k for k in itertools.count() if weights.get(f"MoE.{k}.W.weight") is None)
    p, mix = route(weights.under(f"router.{task}"), x, count)
    mixture = 0
    for k in range(count):
        expert = weights.under(f"MoE.{k}")
        mixture = mixture + p[:, k, None, None, None] * expert.conv("M", expert.conv("W", x))
    own = weights.under(f"proj_task.{task}")
    mixed = mix[:, :, None, None] * own.conv("M", own.conv("W", x))
    joined = weights.batch_norm(f"Bn_all.{task}", mixture) + mixed + weights.conv("proj_gerneral", x.detach())
    return weights.batch_norm(f"Bn.{task}", joined)


class PlainReleased:
    """Decoder and heads. `dead_branch` also evaluates the experts whose output is thrown away (random weights)."""

    def __init__(self, model: MultiTaskModel, scan: Scan, *, dead_branch: bool = False):
        self.weights = Weights(published_weights(model))
        self.tasks, self.scan, self.curve = list(model.tasks), scan, (model.decoder.scan, model.decoder.orders)
        self.stages = len(model.backbone.out_indices)
        grid = model.backbone.grid
        self.dead = [self.dead_weights(s, grid) for s in range(self.stages)] if dead_branch else None

    def __call__(self, stages: list[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, channels, *size) logits."""
        orders = scan_orders(self.curve[0], *stages[0].shape[-2:], self.curve[1]).to(stages[0].device)
        features = [self.stage(index, x, orders) for index, x in enumerate(stages)]
        outputs = {}
        for task in self.tasks:
            outputs[task] = resize(self.head(task, self.fuse(task, [f[task] for f in features])), size)
        return outputs

    def stage(self, index: int, x: Tensor, orders: Tensor) -> dict[str, Tensor]:
        """(B, C, h, w) → task name → (B, d, h, w)."""
        w = self.weights.under(f"{STAGE}.{index}")
        shared = w.group_norm("input_norm", w.conv("first_decode", x))
        outputs = {}
        for task in self.tasks:
            u = w.conv(f"task_conv.{task}", shared)
            n = w.group_norm(f"task_input_norm0.{task}", u)
            if self.dead is not None:
                run_experts(self.dead[index], task, n)
            z = F.silu(w.conv(f"proj_z0.{task}", n))
            signal = w.conv(f"dim_expand_proj_x0.{task}", F.silu(n))
            y = self.scanned(w, task, signal, orders)
            outputs[task] = u + w.conv(f"dim_decrease_proj0.{task}", y) * z
        return outputs

    def scanned(self, w: Weights, task: str, x: Tensor, orders: Tensor) -> Tensor:
        """(B, e, h, w) signal of one task → (B, e, h, w)."""
        low = w.linear(f"x2dt_proj0.{task}", x.flatten(2).transpose(1, 2))
        step = w.under(f"dt_proj0.{task}")
        delta = F.linear(low, step["weight"]).transpose(1, 2)
        B, C = (
            (run_experts(w.under(f"{p}_proj0"), task, x) + w[f"task_prompt_{p}.{task}"].reshape(-1, 1, 1)).flatten(2)
            for p in "BC"
        )
        A = -torch.exp(w[f"A_log0.{task}"].float())
        parts = Parts(x.flatten(2), delta, A, B, C, w[f"D0.{task}"], step["bias"])
        return self.scan(parts, orders).view_as(x)

    def fuse(self, task: str, maps: list[Tensor]) -> Tensor:
        """S maps (B, d, h, w) of one task → their weighted sum."""
        w = self.weights.under(f"backbone.task_mask.{task}")
        hidden = F.gelu(w.batch_norm("1", w.conv("0", torch.cat(maps, dim=1))))
        shares = w.conv("3", hidden).softmax(1)
        return sum(shares[:, s, None] * x for s, x in enumerate(maps))

    def head(self, task: str, x: Tensor) -> Tensor:
        """(B, d, h, w) → (B, channels, 4h, 4w), the 3×3 convolution on the large map."""
        w = self.weights.under(f"heads.{task}")
        large = F.interpolate(x, scale_factor=HEAD_SCALE, mode="bilinear", align_corners=False)
        return w.conv("linear_pred", F.gelu(w.batch_norm("mt_proj.1", w.conv("mt_proj.0", large))))

    def dead_weights(self, index: int, grid: tuple[int, int]) -> Weights:
        """Random weights of a stage's dead branch: the layout of B's experts, from width to width."""
        stage = self.weights.under(f"{STAGE}.{index}")
        alive = stage.under("B_proj0")
        width, kernel = len(stage[f"task_conv.{self.tasks[0]}.weight"]), (DEAD_KERNEL, DEAD_KERNEL)
        found = {}
        for key, value in self.weights.tensors.items():
            name = key.removeprefix(alive.prefix)
            if not key.startswith(alive.prefix):
                continue
            shape = dead_shape(name, tuple(value.shape), width, kernel, grid)
            fan_in = max(1, torch.Size(shape[1:]).numel())
            found[name] = torch.ones(shape) if name.endswith("running_var") else torch.randn(shape) / fan_in**0.5
        return Weights({name: value.to(alive["proj_gerneral.weight"].device) for name, value in found.items()})


def dead_shape(
    name: str, alive: tuple[int, ...], width: int, kernel: tuple[int, int], grid: tuple[int, int]
) -> tuple[int, ...]:
    """Shape of a tensor of the dead branch from that of B's experts: `width` channels in and out, another kernel and rank."""
    part, kind = name.split(".")[-2:]
    weight = kind == "weight"
    hidden = width // 4
    if part == "W":
        return (DEAD_RANK, width, *kernel) if weight else (DEAD_RANK,)
    if part == "M":
        return (width, DEAD_RANK, 1, 1) if weight else (width,)
    if part == "proj_gerneral":
        return (width, width, *kernel) if weight else (width,)
    if part == "convsp":
        return (1, grid[0] * grid[1]) if weight else (1,)
    if part in ("conv1", "conv2"):
        return (hidden, width) if weight else (hidden,)
    if part == "conv3":
        return (hidden, hidden) if weight else (hidden,)
    if part == "ln":
        return (hidden,)
    if part == "1":
        return (alive[0], 2 * hidden) if weight else alive
    return () if kind == "num_batches_tracked" else (width,)  # ln_sp and the BatchNorms
