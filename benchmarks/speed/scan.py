"""The selective scan: this package's engines, the published recurrence and mamba.py's parallel scan."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from pamm.nn.serialize import scan_orders
from pamm.ops import selective_scan
from speed import BenchError
from speed.machine import scan_floor
from speed.measure import Candidate, Workload
from speed.plain_scan import Parts, along_orders, mambapy, recurrence

SHAPES: dict[str, dict[str, int]] = {
    "nyud-b": {"channels": 1536, "state": 16, "height": 28, "width": 36, "orders": 4},
    "pascal-b": {"channels": 1536, "state": 64, "height": 32, "width": 32, "orders": 4},
    "pascal-l": {"channels": 2048, "state": 64, "height": 32, "width": 32, "orders": 4},
}
"""One task's scan in PAMM: NYUD-v2 448×576 and PASCAL-Context 512×512, ViT-B and ViT-L."""

PLAIN: dict[str, Callable[[Parts], Tensor]] = {"recurrence": recurrence, "mambapy": mambapy}


def workload(settings: Mapping[str, Any], only: str | None = None) -> Workload:
    """Candidates "pamm", "pamm: <engine>", "recurrence", "mambapy", or the one named.

    settings: channels, state, height, width, orders, batch, groups, per_order, backward, dtype, device, candidates.
    """
    inputs, orders = random_inputs(settings)
    plain = Parts(
        *(values[0].transpose(-1, -2) if index in (0, 1, 3, 4) else values[0] for index, values in enumerate(inputs))
    )
    dy = torch.randn(inputs[0].shape, device=orders.device).to(inputs[0].dtype)
    found = {}
    for name in [only] if only else settings["candidates"]:
        if name.startswith("pamm"):
            run = _ours(inputs, orders, dy, name.partition(": ")[2] or "auto", settings["backward"])
        else:
            _require(name)
            run = _plain(PLAIN[name], plain, orders, dy[0].transpose(1, 2), settings["backward"])
        found[name] = Candidate(run, count_flops=False)
    batch, length, channels = inputs[0].shape[1:]
    steps = batch * channels * settings["state"] * length * len(orders)
    moved = sum(values.nbytes for values in inputs) + inputs[0].nbytes
    shared = not settings["per_order"]

    def floor() -> dict[str, Any]:
        return scan_floor(steps, len(orders), shared, moved, settings["device"], torch.get_num_threads())

    shape = {key: settings[key] for key in ("batch", "channels", "state", "height", "width", "orders", "per_order")}
    return Workload(found, shape, steps=steps, floor=None if settings["backward"] else floor)


def random_inputs(settings: Mapping[str, Any]) -> tuple[list[Tensor], Tensor]:
    """x, delta, A, B, C, D, delta_bias as `pamm.ops.selective_scan` takes them for one group, and the Hilbert orders."""
    generator = torch.Generator().manual_seed(0)
    batch, channels, size = settings["batch"], settings["channels"], settings["state"]
    orders = scan_orders("hilbert", settings["height"], settings["width"], settings["orders"])
    lead = (1, batch, len(orders)) if settings["per_order"] else (1, batch)
    own = (1, len(orders)) if settings["per_order"] else (1,)
    length = orders.shape[1]

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    varying = [normal(1, batch, length, channels), normal(*lead, length, channels)]
    varying += [normal(*lead, length, size) for _ in range(2)]
    A = -torch.arange(1.0, size + 1).expand(*own, channels, size).contiguous()
    constant = [A, normal(*own, channels), normal(*own, channels) - 3]
    x, delta, B, C = (values.to(settings["device"], getattr(torch, settings["dtype"])) for values in varying)
    A, D, bias = (values.to(settings["device"]) for values in constant)
    inputs = [values.requires_grad_(settings["backward"]) for values in (x, delta, A, B, C, D, bias)]
    return inputs, orders.to(settings["device"])


def _ours(inputs: list[Tensor], orders: Tensor, dy: Tensor, engine: str, backward: bool) -> Callable[[], Any]:
    x, delta, A, B, C, D, bias = inputs

    def forward() -> Tensor:
        with torch.set_grad_enabled(backward):
            return selective_scan(x, delta, A, B, C, D, orders, delta_bias=bias, engine=engine)

    def both() -> dict[str, Tensor]:
        gradients = torch.autograd.grad(forward(), inputs, dy)
        moved = (g[0].transpose(-1, -2) if index in (0, 1, 3, 4) else g[0] for index, g in enumerate(gradients))
        return dict(zip(Parts._fields, moved, strict=True))

    return both if backward else lambda: forward()[0].transpose(1, 2)


def _plain(
    one: Callable[[Parts], Tensor], parts: Parts, orders: Tensor, dy: Tensor, backward: bool
) -> Callable[[], Any]:
    leaves = Parts(*(values.detach().requires_grad_(backward) for values in parts))

    def forward() -> Tensor:
        with torch.no_grad():
            return along_orders(one, leaves, orders)

    def both() -> dict[str, Tensor]:
        """Forward and backward one order at a time, so that only one order's states are in memory: kinder than autograd."""
        total = [torch.zeros_like(values) for values in leaves]
        for moved, order in leaves.each(orders):
            y = one(moved)
            found = torch.autograd.grad(y, leaves, dy[..., order].float(), materialize_grads=True)
            for sum_, gradient in zip(total, found, strict=True):
                sum_ += gradient
        return dict(zip(Parts._fields, total, strict=True))

    return both if backward else forward


def _require(name: str) -> None:
    if name not in PLAIN:
        raise BenchError(f"unknown candidate '{name}'; known: pamm, pamm: ENGINE, {', '.join(PLAIN)}")
    if name == "mambapy" and importlib.util.find_spec("mambapy") is None:
        raise BenchError("the candidate mambapy needs the library: pip install 'pamm[bench]', or leave it out")
