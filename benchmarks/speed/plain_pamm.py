"""PAMM in plain form: one task after another, one expert after another, and the head's 3×3 convolution on the large map.

The same function as `pamm.models.pamm` with every switch on, written as the paper's equations read, with modules of its own
for every task, so that training can be compared as well.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.config.experiment import ExpertsConfig, PAMMConfig
from pamm.models.model import MultiTaskModel, resize
from pamm.nn.serialize import scan_orders
from speed import BenchError
from speed.plain_scan import Parts, Scan

GROUPS, HEAD_SCALE = 32, 4


class PlainRouter(nn.Module):
    """One task's router (paper eq. 9, 11-13)."""

    def __init__(self, channels: int, experts: ExpertsConfig):
        super().__init__()
        hidden = channels // 4
        self.first, self.second = nn.Linear(channels, hidden), nn.Linear(channels, hidden)
        self.logits, self.noise = nn.Linear(2 * hidden, experts.count), nn.Linear(2 * hidden, experts.count)
        self.top_k = experts.top_k

    def forward(self, x: Tensor) -> Tensor:
        """(B, L, e) → (B, E)."""
        f = torch.cat([self.first(x).mean(1), self.second(x.mean(1))], dim=1)
        logits = F.gelu(self.logits(f)).float()
        if self.training:
            logits = logits + torch.randn_like(logits) * self.noise(f)
        p = logits.softmax(1)
        return p * torch.zeros_like(p).scatter_(1, p.topk(self.top_k, dim=1).indices, 1.0)


class PlainExperts(nn.Module):
    """B or C of all tasks (paper eq. 14-16): every expert evaluated, whatever its weight."""

    def __init__(self, tasks: Sequence[str], channels: int, config: PAMMConfig):
        super().__init__()
        size, experts = config.state_size, config.experts
        self.reduce = nn.ModuleList(nn.Linear(channels, experts.rank, bias=False) for _ in range(experts.count))
        self.restore = nn.ModuleList(nn.Linear(experts.rank, size, bias=False) for _ in range(experts.count))
        self.router = nn.ModuleDict({task: PlainRouter(channels, experts) for task in tasks})
        self.linear = nn.ModuleDict({task: nn.Linear(channels, size, bias=False) for task in tasks})
        self.prior = nn.ParameterDict({task: nn.Parameter(torch.zeros(size)) for task in tasks})

    def forward(self, task: str, x: Tensor) -> Tensor:
        """(B, L, e) → (B, L, N)."""
        p = self.router[task](x)
        y = self.linear[task](x)
        for k, (reduce, restore) in enumerate(zip(self.reduce, self.restore, strict=True)):
            y = y + p[:, k, None, None] * restore(reduce(x))
        return y + self.prior[task]


class PlainTask(nn.Module):
    """One task's own layers in one stage (paper Fig. 3), all but the experts."""

    def __init__(self, config: PAMMConfig):
        super().__init__()
        width, expanded, rank = config.width, 2 * config.width, math.ceil(config.width / 16)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.norm = nn.GroupNorm(GROUPS, width)
        self.dwconv = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.gate, self.expand = nn.Conv2d(width, width, 1), nn.Conv2d(width, expanded, 1)
        self.delta_reduce = nn.Linear(expanded, rank, bias=False)
        self.delta_restore = nn.Linear(rank, expanded, bias=False)
        self.delta_bias = nn.Parameter(torch.zeros(expanded))
        self.A_log = nn.Parameter(torch.zeros(expanded, config.state_size))
        self.D = nn.Parameter(torch.ones(expanded))
        self.contract = nn.Conv2d(expanded, width, 1)


class PlainStage(nn.Module):
    """Task Convolution and PAME of one stage."""

    def __init__(self, config: PAMMConfig, channels: int, tasks: Sequence[str]):
        super().__init__()
        self.shared = nn.Conv2d(channels, config.width, 3, padding=1, bias=False)
        self.norm = nn.GroupNorm(GROUPS, config.width)
        self.tasks = nn.ModuleDict({task: PlainTask(config) for task in tasks})
        self.B, self.C = (PlainExperts(tasks, 2 * config.width, config) for _ in range(2))

    def forward(self, stage: Tensor, orders: Tensor, scan: Scan) -> dict[str, Tensor]:
        """(B, C, h, w) → task name → (B, d, h, w)."""
        shared = self.norm(self.shared(stage))
        return {task: self.one_task(task, own, shared, orders, scan) for task, own in self.tasks.items()}

    def one_task(self, task: str, own: PlainTask, shared: Tensor, orders: Tensor, scan: Scan) -> Tensor:
        u = own.conv(shared)
        n = own.norm(u)
        z = F.silu(own.gate(n))
        x = own.expand(F.silu(own.dwconv(n)))
        tokens = x.flatten(2).transpose(1, 2)
        delta = own.delta_restore(own.delta_reduce(tokens)).transpose(1, 2)
        B, C = (experts(task, tokens).transpose(1, 2) for experts in (self.B, self.C))
        y = scan(Parts(x.flatten(2), delta, -torch.exp(own.A_log), B, C, own.D, own.delta_bias), orders)
        return u + own.contract(y.view_as(x)) * z


class PlainHead(nn.Module):
    """Task Decoder and head of one task (paper eq. 21-23)."""

    def __init__(self, width: int, stages: int, channels: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Conv2d(stages * width, width, 1), nn.GELU(), nn.Conv2d(width, stages, 1))
        self.conv = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.predict = nn.Conv2d(width, channels, 1)

    def forward(self, stages: list[Tensor]) -> Tensor:
        """S maps (B, d, h, w) → (B, channels, 4h, 4w)."""
        shares = self.mlp(torch.cat(stages, dim=1)).float().softmax(1)
        fused = sum(shares[:, s, None].to(x.dtype) * x for s, x in enumerate(stages))
        large = F.interpolate(fused, scale_factor=HEAD_SCALE, mode="bilinear", align_corners=False)
        return self.predict(F.gelu(self.norm(self.conv(large))))


class PlainPAMM(nn.Module):
    """Decoder and heads of a built network, with a copy of its weights. Raises BenchError where a switch is off."""

    def __init__(self, model: MultiTaskModel, config: PAMMConfig, scan: Scan):
        super().__init__()
        whole = config.task_conv and config.pame and config.experts.B and config.experts.C
        count = len(model.backbone.out_indices)
        if not (whole and config.prior_B and config.prior_C and count > 1):
            raise BenchError(
                "the plain form of PAMM has every switch on; measure a recipe without variants, or --plain none"
            )
        self.scan, self.curve, tasks = scan, (config.scan, config.orders), list(model.tasks)
        self.stages = nn.ModuleList(PlainStage(config, model.backbone.channels, tasks) for _ in range(count))
        self.heads = nn.ModuleDict(
            {t: PlainHead(config.width, count, task.channels) for t, task in model.tasks.items()}
        )
        self.load_state_dict(plain_state(model.state_dict(), tasks))
        self.train(model.training)

    def forward(self, stages: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """S maps (B, C, h, w) → task name → (B, channels, *size) logits."""
        orders = scan_orders(self.curve[0], *stages[0].shape[-2:], self.curve[1]).to(stages[0].device)
        features = [block(x, orders, self.scan) for block, x in zip(self.stages, stages, strict=True)]
        return {task: resize(head([f[task] for f in features]), size) for task, head in self.heads.items()}


def plain_state(own: Mapping[str, Tensor], tasks: Sequence[str]) -> dict[str, Tensor]:
    """Tensors of `pamm.models.pamm` by name → those of `PlainPAMM`. Linear, so that it holds for gradients as well."""
    found = {}
    stages = 1 + max(int(name.split(".")[2]) for name in own if name.startswith("decoder.pame."))
    for s in range(stages):
        local, pame = f"decoder.local.{s}.", f"decoder.pame.{s}."
        found[f"stages.{s}.shared.weight"] = own[f"{local}shared.weight"]
        for kind in ("weight", "bias"):
            found[f"stages.{s}.norm.{kind}"] = own[f"{local}norm.{kind}"]
        for t, task in enumerate(tasks):
            parts = _task_state(own, local, pame, t, len(tasks))
            found |= {f"stages.{s}.tasks.{task}.{name}": value for name, value in parts.items()}
        for p in "BC":
            parts = _experts_state(own, f"{pame}{p}.", own[f"{pame}prior_{p}.prior"], tasks)
            found |= {f"stages.{s}.{p}.{name}": value for name, value in parts.items()}
    for t, task in enumerate(tasks):
        for kind in ("weight", "bias"):
            for layer in ("0", "2"):
                found[f"heads.{task}.mlp.{layer}.{kind}"] = _task_conv(own, f"decoder.fuse.mlp.{layer}", t)[kind]
        prefix = f"heads.{task}."
        found |= {name: value for name, value in own.items() if name.startswith(prefix)}
    return found


def _task_state(own: Mapping[str, Tensor], local: str, pame: str, t: int, tasks: int) -> dict[str, Tensor]:
    """The tensors of `PlainTask` for task number t."""
    found = {}
    stacked = {"conv": f"{local}tasks", "norm": f"{pame}norm", "dwconv": f"{pame}dwconv"}
    for name, theirs in stacked.items():
        for kind in ("weight", "bias"):
            found[f"{name}.{kind}"] = own[f"{theirs}.{kind}"].chunk(tasks)[t]
    for name in ("gate", "expand", "contract"):
        found |= {f"{name}.{kind}": value for kind, value in _task_conv(own, f"{pame}{name}", t).items()}
    for name, index in (("delta_reduce", 0), ("delta_restore", 1)):
        found[f"{name}.weight"] = own[f"{pame}delta.{index}.weight"][t]
    return found | {name: own[f"{pame}{name}"][t] for name in ("delta_bias", "A_log", "D")}


def _task_conv(own: Mapping[str, Tensor], name: str, t: int) -> dict[str, Tensor]:
    """Task number t of a linear map over tokens as a 1×1 convolution."""
    return {"weight": own[f"{name}.weight"][t][:, :, None, None], "bias": own[f"{name}.bias"][t, 0]}


def _experts_state(own: Mapping[str, Tensor], name: str, prior: Tensor, tasks: Sequence[str]) -> dict[str, Tensor]:
    """The tensors of `PlainExperts`."""
    found = {}
    count = own[f"{name}router.logits.weight"].shape[1]
    for k, (reduce, restore) in enumerate(
        zip(own[f"{name}reduce.weight"].chunk(count), own[f"{name}restore"].chunk(count), strict=True)
    ):
        found |= {f"reduce.{k}.weight": reduce, f"restore.{k}.weight": restore.T}
    for t, task in enumerate(tasks):
        found |= {f"linear.{task}.weight": own[f"{name}linear.weight"][t], f"prior.{task}": prior[t, 0, 0]}
        weight, bias = own[f"{name}router.project.weight"][t], own[f"{name}router.project.bias"][t, 0]
        for half, layer in enumerate(("first", "second")):
            found[f"router.{task}.{layer}.weight"] = weight.chunk(2)[half]
            found[f"router.{task}.{layer}.bias"] = bias.chunk(2)[half]
        for layer in ("logits", "noise"):
            found[f"router.{task}.{layer}.weight"] = own[f"{name}router.{layer}.weight"][t]
            found[f"router.{task}.{layer}.bias"] = own[f"{name}router.{layer}.bias"][t, 0]
    return found
