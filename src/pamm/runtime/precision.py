"""Arithmetic of predictions and evaluations: float32, or half precision if the processor multiplies it faster."""

from __future__ import annotations

import torch

from pamm.config.renamed import precision_name
from pamm.config.strict import ConfigError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Precision → dtype of matrix products and convolutions."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}
"""The other way round."""


def bfloat16_units() -> str | None:
    """The units of this CPU that multiply bfloat16 matrices; None without any, where float32 is faster."""
    for name, probe in (("AMX", "_is_amx_tile_supported"), ("AVX-512 BF16", "_is_avx512_bf16_supported")):
        if getattr(torch.cpu, probe, lambda: False)():
            return name
    return None


def choose_precision(name: str, device: str | torch.device = "cpu") -> torch.dtype:
    """The dtype of matrix products on a device.

    Args:
        name: one of `pamm.config.renamed.PRECISIONS`, or an earlier word for it. "auto" is bfloat16 on a CPU that has units
            for it, else float32.
        device: a torch device.

    Raises:
        ConfigError: another name, or half precision on a device that has none.
    """
    name, kind = precision_name(name), torch.device(device).type
    if name == "auto":
        name = "bf16" if kind == "cpu" and bfloat16_units() is not None else "fp32"
    if name != "fp32" and not torch.amp.is_autocast_available(kind):
        raise ConfigError(f"precision: {name} cannot be used on {kind}; choose fp32")
    return DTYPES[name]
