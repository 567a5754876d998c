"""Self-attention within windows (W-MSA of the Swin Transformer), with weights of their own for every task."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pamm.nn.task_layers import TaskLinear


class WindowAttention(nn.Module):
    """Multi-head attention in windows of window_size × window_size positions side by side, with a relative position bias.

    Maps are padded to whole windows with zeros at the right and bottom; padded positions are not masked.

    Args:
        tasks: number of tasks T.
        channels: channels c, a multiple of `num_heads`.
        num_heads: attention heads.
        window_size: side of a window, positions.

    Raises:
        ValueError: the heads cannot share the channels equally.
    """

    def __init__(self, tasks: int, channels: int, num_heads: int, window_size: int):
        super().__init__()
        if channels % num_heads:
            raise ValueError(f"{channels} channels cannot be shared equally by {num_heads} attention heads")
        self.num_heads, self.window_size = num_heads, window_size
        self.query, self.key, self.value, self.project = (TaskLinear(tasks, channels, channels) for _ in range(4))
        self.bias = nn.Parameter(torch.empty(tasks, num_heads, (2 * window_size - 1) ** 2))
        nn.init.trunc_normal_(self.bias, std=0.02)

    def forward(self, x: Tensor, source: Tensor | None = None) -> Tensor:
        """(T, B, h, w, c) → (T, B, h, w, c). Queries and keys are made from `source`, a map like x, by default x itself."""
        values = self.cut(x)
        places = values if source is None else self.cut(source)
        q, k, v = (self.split(f(y)) for f, y in ((self.query, places), (self.key, places), (self.value, values)))
        bias = self.bias[:, :, relative_positions(self.window_size, x.device)]  # (T, heads, n, n)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[:, None].to(q.dtype))
        y = self.project(y.transpose(2, 3).flatten(3))
        return self.join(y, x.shape)

    def split(self, y: Tensor) -> Tensor:
        """Split channels into heads.

        Args:
            y: (T, M, n, c).

        Returns:
            (T, M, heads, n, c / heads).
        """
        return y.unflatten(-1, (self.num_heads, -1)).transpose(2, 3)

    def cut(self, x: Tensor) -> Tensor:
        """Cut a map into M windows of n positions.

        Args:
            x: (T, B, h, w, c).

        Returns:
            (T, M, n, c).
        """
        side = self.window_size
        x = F.pad(x, (0, 0, 0, -x.shape[3] % side, 0, -x.shape[2] % side))
        x = x.unflatten(3, (-1, side)).unflatten(2, (-1, side))  # (T, B, rows, side, columns, side, c)
        return x.transpose(3, 4).flatten(4, 5).flatten(1, 3)

    def join(self, y: Tensor, shape: torch.Size) -> Tensor:
        """Inverse of `cut`.

        Args:
            y: (T, M, n, c).
            shape: shape (T, B, h, w, c) of the map.

        Returns:
            (T, B, h, w, c).
        """
        side, (height, width) = self.window_size, shape[2:4]
        y = y.unflatten(2, (side, side)).unflatten(1, (shape[1], -(-height // side), -(-width // side)))
        return y.transpose(3, 4).flatten(4, 5).flatten(2, 3)[:, :, :height, :width]


def relative_positions(window_size: int, device: torch.device | str = "cpu") -> Tensor:
    """(n, n) int64: which of the (2·window_size − 1)² offsets lies between two positions of a window."""
    place = torch.arange(window_size, device=device)
    row, column = place.repeat_interleave(window_size), place.repeat(window_size)
    rows, columns = (axis[:, None] - axis + window_size - 1 for axis in (row, column))
    return rows * (2 * window_size - 1) + columns
