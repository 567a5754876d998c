"""Arithmetic of predictions and evaluations: float32, or bfloat16 if the processor multiplies it faster."""

from __future__ import annotations

from typing import Literal, get_args

import torch

from pamm.config.strict import ConfigError

Precision = Literal["auto", "float32", "bfloat16"]


def bfloat16_units() -> str | None:
    """The units of this CPU that multiply bfloat16 matrices; None without any, where float32 is faster."""
    for name, probe in (("AMX", "_is_amx_tile_supported"), ("AVX-512 BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            return name
    return None


def choose_precision(name: Precision, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype of matrix products on this device. "auto": bfloat16 on a CPU that has units for it, else float32.

    Raises ConfigError for another name, and for bfloat16 on a device that has none.
    """
    if name not in get_args(Precision):
        raise ConfigError(f"precision: found {name!r}, expected one of {', '.join(get_args(Precision))}")
    kind = torch.device(device).type
    if name == "bfloat16" and not torch.amp.is_autocast_available(kind):
        raise ConfigError(f"precision: bfloat16 cannot be used on {kind}; choose float32")
    wanted = name == "bfloat16" or (name == "auto" and kind == "cpu" and bfloat16_units() is not None)
    return torch.bfloat16 if wanted else torch.float32
