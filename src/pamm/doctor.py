"""`pamm doctor`: the engines, kernels and extras of this machine, with reasons and remedies."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from importlib.metadata import PackageNotFoundError, requires, version

from pamm.command_line import parser

EXTRAS = {
    "train": ["lightning_fabric", "torchmetrics", "scipy", "skimage", "cv2", "tensorboard"],
    "demo": ["trimesh", "embreex", "scipy", "skimage"],
    "plots": ["matplotlib"],
    "bench": ["mambapy", "matplotlib"],
    "heif": ["pillow_heif"],
}
"""Extra → the modules it brings."""


def main(arguments: list[str]) -> int:
    """Run `pamm doctor`. Prints the findings; 0 when the library can run, 1 when something it cannot do without is broken."""
    parser("doctor").parse_args(arguments)
    print(f"pamm {version('pamm')}, Python {platform.python_version()}, {platform.platform()}")
    healthy = _torch()
    if healthy:
        _devices()
        _kernels()
        _engines()
    for extra, modules in EXTRAS.items():
        absent = [name for name in modules if not _imports(name)]
        state = f"absent: {', '.join(absent)}. Remedy: pip install 'pamm[{extra}]'" if absent else "installed"
        print(f"  extra {extra:<8} {state}")
    print(f"  free disk      {shutil.disk_usage('.').free / 1e9:.0f} GB here")
    print("ready" if healthy else "not ready: see the remedies above")
    return 0 if healthy else 1


def _torch() -> bool:
    """Whether torch, torchvision and timm import together (a torchvision built for another torch breaks timm)."""
    for name in ("torch", "torchvision", "timm"):
        try:
            importlib.import_module(name)
            print(f"  {name:<14} {version(name)}")
        except Exception as error:
            print(f"  {name:<14} does not import: {str(error).splitlines()[0] if str(error) else type(error).__name__}")
            if name == "torchvision":
                print(f"    Remedy: install the torchvision made for torch {_version('torch')}, both from one index:")
                print("    pip install --upgrade torch torchvision")
            else:
                print(f"    Remedy: {sys.executable} -m pip install --upgrade {name}")
            return False
    return True


def _devices() -> None:
    import torch

    from pamm.runtime.precision import bfloat16_units

    units = bfloat16_units()
    lower = f"bf16 by {units}: --precision auto takes it" if units else "no units for bf16: fp32 is the faster"
    print(f"  CPU            {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, {lower}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            print(f"  GPU {index}          {torch.cuda.get_device_name(index)}")
    elif torch.backends.mps.is_available():
        print("  GPU            Apple (mps)")
    else:
        print("  GPU            none that torch can use: training and prediction run on the CPU")


def _kernels() -> None:
    """The kernels that replace a network's modules here, and how many of a large PAMM's modules each replaces."""

    from pamm.build import create_model
    from pamm.kernels import REWRITES, accelerate
    from pamm.ops import kernel_cache

    report = accelerate(create_model("nyud-pamm-b", device="meta"), training=False)
    print("  faster modules in the place of a network's own (--kernels off: none; counts: in nyud-pamm-b):")
    for rewrite in REWRITES:
        reason = rewrite.objection() or rewrite.kernel.unavailable()
        count = len(report.replaced.get(rewrite.name, ()))
        if rewrite.objection() or (rewrite.name in report.left and reason):
            print(f"    {rewrite.name}: left to torch ({reason})")
        else:
            without = f"; here in torch ({reason})" if reason else ""
            print(f"    {rewrite.name}: {count} modules; {rewrite.how}{without}")
    not_kept = kernel_cache.objection()
    if not_kept:
        print(f"    compiled anew by every process: {not_kept}")


def _engines() -> None:
    from pamm.ops.selective_scan import explain

    print("  selective scan engines, fastest first:")
    for row in explain():
        print(f"    {row.engine:<12} {'available' if row.available else 'not available'}: {row.reason}")


def _imports(name: str) -> bool:
    try:
        importlib.import_module(name)
    except Exception:
        return False
    return True


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return f"(none; pamm needs {', '.join(r for r in requires('pamm') or [] if r.startswith(name))})"
