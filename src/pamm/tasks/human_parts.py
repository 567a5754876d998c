"""Human part segmentation."""

from __future__ import annotations

import torch
from torch import Tensor

from pamm.tasks.segmentation import ClassMap
from pamm.tasks.task import register


@register
class HumanParts(ClassMap):
    """The body part of every pixel. Default: the six parts of PASCAL-Context and background.

    Only images with at least one part pixel count (the benchmark's rule), so `finish` ignores every other label.
    """

    name = "human_parts"
    default_classes = ("background", "head", "torso", "upper_arm", "lower_arm", "upper_leg", "lower_leg")

    def finish(self, label: Tensor) -> Tensor:
        """A label that has only background and ignored pixels becomes all ignored."""
        if torch.any((label != 0) & (label != self.ignore)):
            return label
        return torch.full_like(label, self.ignore)
