"""The inputs of a scan as one value, and what several engines derive from them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class Inputs(NamedTuple):
    """The inputs of `pamm.ops.selective_scan`, of the shapes given there, with zeros where no bias was given.

    Engines get them checked and as `prepared` leaves them. These are methods without arguments, not properties: older
    versions of torch.compile do not follow a named tuple's properties.
    """

    x: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor
    delta_bias: Tensor
    orders: Tensor
    softplus: bool

    def tensors(self) -> tuple[Tensor, ...]:
        """The seven that have a gradient."""
        return self[:7]

    def per_order(self) -> bool:
        """Whether every order has parameters of its own."""
        return self.delta.dim() == 5

    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Groups, images, orders, positions, channels, states."""
        groups, images, length, channels = self.x.shape
        return groups, images, self.orders.shape[0], length, channels, self.A.shape[-1]

    def prepared(self) -> Inputs:
        """x and delta in one dtype, which is that of y, dx and ddelta; the other tensors in that of the states.

        The states' dtype is float32, with x in float64 float64.
        """
        wide = torch.float64 if self.x.dtype == torch.float64 else torch.float32
        narrow = self.x.dtype if self.delta.dtype == self.x.dtype else wide
        parameters = (tensor.to(wide) for tensor in self[2:7])
        return Inputs(self.x.to(narrow), self.delta.to(narrow), *parameters, orders=self.orders, softplus=self.softplus)

    def shifted(self) -> Tensor:
        """delta + delta_bias, shaped as delta, in the states' dtype."""
        return torch.add(self.delta, self.delta_bias[:, None, ..., None, :])

    def steps(self) -> Tensor:
        """The step Δ, shaped as delta, in the states' dtype."""
        return F.softplus(self.shifted()) if self.softplus else self.shifted()

    def skip(self) -> Tensor:
        """Weight of x itself in the sum over the orders: (G, 1, 1, D)."""
        skip = self.D.sum(1) if self.per_order() else self.D * len(self.orders)
        return skip[:, None, None, :]

    def skip_gradient(self, one: Tensor) -> Tensor:
        """Gradient of D from that of one order's skip, (G, D), which is the same in every order."""
        return one[:, None].expand_as(self.D).contiguous() if self.per_order() else one * len(self.orders)

    def gradients(
        self, dy: Tensor, dx: Tensor, dsteps: Tensor, dA: Tensor, dB: Tensor, dC: Tensor
    ) -> tuple[Tensor, ...]:
        """Gradients of the seven tensors from those of y, x, Δ, A, B and C. `dsteps` is overwritten."""
        if self.softplus:
            dsteps = dsteps.mul_(self.shifted().sigmoid_())
        dD = self.skip_gradient((dy.to(self.D.dtype) * self.x).sum((1, 2)))
        found = (dx, dsteps, dA, dB, dC, dD, dsteps.sum((1, -2)))
        return tuple(g.to(given.dtype).contiguous() for g, given in zip(found, self.tensors(), strict=True))

    def check(self) -> None:
        """Raise ValueError unless the shapes are those of one of the two forms, on one device."""
        x, delta, orders = self.x, self.delta, self.orders
        if x.dim() != 4:
            raise ValueError(f"x: found shape {tuple(x.shape)}, expected 4 axes (groups, images, positions, channels)")
        if delta.dim() not in (4, 5):
            raise ValueError(
                f"delta: found shape {tuple(delta.shape)}, expected (groups, images, positions, channels), or (groups, "
                "images, orders, positions, channels) where every order has its own parameters"
            )
        if orders.dim() != 2 or orders.dtype != torch.int64 or not 1 <= orders.shape[0] <= 8:
            raise ValueError(
                f"orders: found {orders.dtype} of shape {tuple(orders.shape)}, expected int64 (1 to 8 orders, "
                "positions); pamm.nn.serialize.scan_orders makes them"
            )
        N = self.A.shape[-1] if self.A.dim() else 0
        form = "one set of parameters per order" if self.per_order() else "parameters shared by the orders"
        for name, expected in self._expected_shapes(N).items():
            tensor = getattr(self, name)
            if tensor.shape != expected:
                raise ValueError(
                    f"{name}: found shape {tuple(tensor.shape)}, expected {expected} for x {tuple(x.shape)}, "
                    f"{orders.shape[0]} orders, state size {N} and {form} (as delta's {delta.dim()} axes say)"
                )
            if tensor.device != x.device:
                raise ValueError(f"{name} is on {tensor.device} and x on {x.device}; move them to one device")
        if x.numel() == 0 or N == 0:
            raise ValueError(f"nothing to scan: x has shape {tuple(x.shape)} and the state size is {N}")

    def _expected_shapes(self, N: int) -> dict[str, tuple[int, ...]]:
        G, images, L, channels = self.x.shape
        K = (self.orders.shape[0],) if self.per_order() else ()
        return {
            "delta": (G, images, *K, L, channels),
            "A": (G, *K, channels, N),
            "B": (G, images, *K, L, N),
            "C": (G, images, *K, L, N),
            "D": (G, *K, channels),
            "delta_bias": (G, *K, channels),
            "orders": (self.orders.shape[0], L),
        }

    def check_orders(self) -> None:
        """Raise ValueError unless every order visits every position once. On accelerators this would stall: not checked."""
        orders, length = self.orders, self.orders.shape[1]
        if orders.device.type != "cpu":
            return
        if orders.min() < 0 or orders.max() >= length or not torch.zeros_like(orders).scatter_(1, orders, 1).all():
            raise ValueError(f"orders: every row must hold each position from 0 to {length - 1} exactly once")
