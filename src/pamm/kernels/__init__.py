"""Faster modules in the place of a network's own: C kernels for CPUs, and rewrites in torch for any device.

    report = pamm.accelerate(model, training=False)

The networks in `pamm.models` are plain PyTorch. `accelerate` changes a built one from outside; nothing in `pamm.models` or
`pamm.nn` knows of it.
"""

from pamm.kernels.rewrites import REWRITES, Choice, Report, Rewrite, accelerate, apply_choice

__all__ = ["REWRITES", "Choice", "Report", "Rewrite", "accelerate", "apply_choice"]
