"""The network: backbone, decoder, one head per task; and how it is saved, loaded and shared."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import ModelCard, ModelCardData, ModelHubMixin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pamm.files import usual_mode
from pamm.models.backbone import Backbone
from pamm.models.card import CARD, MARK, Origin, read_origin, write_card
from pamm.models.formats import CONFIG_FILE, FIELD, FORMAT, WEIGHTS_FILE, read_format, upgraded_weights
from pamm.models.weights import plain_name
from pamm.nn.checkpointing import call, checkpointed
from pamm.nn.task_layers import TaskLinear
from pamm.tasks import Task

INTERMEDIATE = "intermediate/"
"""Before a task's name: further logits of it, made on the way, which its loss applies to as well. In training mode alone."""

LOSS = "loss/"
"""Before a name: a number that a decoder adds to the total loss. In training mode alone."""


class MultiTaskModel(nn.Module, ModelHubMixin, library_name="pamm", tags=["multi-task", "dense-prediction"]):
    """One image in, logits of every task out.

    Args:
        backbone: image → stage maps.
        decoder: stage maps → task name → features.
        heads: task name → features → logits.
        tasks: task name → task, in the order of the decoder's outputs.
        settings: JSON values from which `pamm.load_model` builds the same network again.
    """

    grad_checkpointing = False
    half_precision: torch.dtype | None = None
    """The dtype of its matrix products and convolutions where that is not float32 (see `use_half_precision`)."""
    backbone: Backbone
    decoder: Any
    """What `pamm.models.registry` builds for the configuration; decoders have attributes of their own."""
    load_report: Any
    """Of a published checkpoint's network: see `pamm.official.load`."""
    origin: Path | None = None
    """The folder that the weights were loaded from."""

    def __init__(
        self,
        backbone: Backbone,
        decoder: nn.Module,
        heads: Mapping[str, nn.Module],
        *,
        tasks: Mapping[str, Task],
        settings: dict[str, Any],
    ):
        super().__init__()
        _one_thread_in_forked_children()
        self.backbone = backbone
        self.decoder = decoder
        self.heads = nn.ModuleDict(heads)
        self.tasks = dict(tasks)
        self.settings = settings
        self._frozen: tuple[nn.Module, ...] = ()  # parts that stay in eval mode

    def forward(self, image: Tensor, size: tuple[int, int] | None = None) -> dict[str, Tensor]:
        """Run the network.

        Args:
            image: (B, 3, H, W) normalised; H and W are multiples of `stride`. It is converted to the weights' dtype, so a
                model after `.half()`, `.bfloat16()` or `.double()` takes it as well.
            size: height and width of the logits, by default the image's.

        Returns:
            Task name → (B, channels, *size) float32 logits. In training mode, some decoders add entries for their losses:
            "intermediate/<task>", further logits of the task (InvPT), and "loss/<name>", a number (MLoRE).
        """
        if self.half_precision is None:
            image = image.to(self.dtype)
        with self._arithmetic():
            stages = self.backbone(image)
        return self.decode(stages, (image.shape[-2], image.shape[-1]) if size is None else size)

    def decode(self, stages: Sequence[Tensor], size: tuple[int, int]) -> dict[str, Tensor]:
        """Run decoder and heads on stage maps.

        Args:
            stages: the backbone's maps (B, C, h, w), first to last.
            size: height and width of the logits, pixels.

        Returns:
            As `forward`.
        """
        run = checkpointed if self.grad_checkpointing else call
        with self._arithmetic():
            features = dict(self.decoder(list(stages)))  # a copy: hooks may hold the decoder's own
            outputs = {task: run(head, features.pop(task)) for task, head in self.heads.items()}
        outputs |= features  # what is left is for the losses
        return {name: x if name.startswith(LOSS) else resize(x, size) for name, x in outputs.items()}

    def freeze(self, modules: Sequence[nn.Module], parameters: Sequence[nn.Parameter] = ()) -> None:
        """Exclude parts from training: they get no gradient and stay in eval mode (no dropout, fixed running statistics).

        Args:
            modules: modules to freeze.
            parameters: further parameters to freeze.
        """
        self._frozen = tuple(modules)
        for part in (*modules, *parameters):
            part.requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> MultiTaskModel:
        """As of any module; what is frozen stays in eval mode."""
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Activation checkpointing for training: activations within a block of the backbone, a stage of the decoder or a head are
        computed again in the backward pass instead of kept. The gradients are the same; it takes less memory and more time.

        Args:
            enable: on or off.
        """
        self.grad_checkpointing = self.decoder.grad_checkpointing = enable
        self.backbone.set_grad_checkpointing(enable)

    def use_half_precision(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """From now on compute matrix products and convolutions in half precision, the rest in float32. For inference.

        The result equals torch's autocast. The weights of these products are converted once and not at every call; training would
        round them at every step.

        Args:
            dtype: torch.bfloat16 or torch.float16.
        """
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d, TaskLinear)):
                module.to(dtype)
        self.half_precision = dtype

    def _arithmetic(self) -> AbstractContextManager:
        if self.half_precision is None:
            return nullcontext()
        return torch.autocast(next(self.parameters()).device.type, self.half_precision)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the weights: float32, unless the whole network was converted."""
        return next(self.parameters()).dtype

    @property
    def stride(self) -> int:
        """The sides of an image are multiples of it, pixels."""
        return self.backbone.output_stride * getattr(self.decoder, "stride", 1)

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width the network was built for; it takes any other multiple of `stride` as well."""
        return tuple(self.settings["image_size"])

    def _save_pretrained(self, save_directory: Path) -> None:
        """Weights as safetensors and settings as JSON (called by `save_pretrained`, which the hub mixin provides)."""
        if (save_directory / CARD).is_file() and MARK in (save_directory / CARD).read_text("utf-8", "replace"):
            (save_directory / CARD).unlink()  # of the weights that stood here
        weights = {key: value.contiguous() for key, value in self._weights()}
        save_file(weights, save_directory / WEIGHTS_FILE, metadata={"format": "pt"})
        usual_mode(save_directory / WEIGHTS_FILE)
        (save_directory / CONFIG_FILE).write_text(json.dumps({FIELD: FORMAT} | self.settings, indent=1))

    def _weights(self) -> Iterator[tuple[str, Tensor]]:
        """Name and value of every weight, as they are saved."""
        return ((plain_name(key), value.detach().cpu()) for key, value in self.state_dict().items())

    def generate_model_card(
        self,
        *,
        run: Path | None = None,
        license: str | None = None,  # noqa: A002 - the Hub's own keyword
        **head: Any,
    ) -> ModelCard:
        """The card that `save_pretrained` and `push_to_hub` put beside the weights, as `model_card_kwargs` make it.

        Args:
            run: where a run keeps these weights, while it trains them. Without it, the card's text on training and scores is
                that of the folder which the model was loaded from, if the weights are still the same.
            license: of the weights, an identifier of the Hub, e.g. "mit".
            head: further fields of the card's head.
        """
        same = run is None and self.origin is not None and self._are_in(self.origin / WEIGHTS_FILE)
        folder = self.origin if same else run
        origin = read_origin(folder, unchanged=same) if folder else Origin()
        data = ModelCardData(
            **{"library_name": "pamm", "tags": ["dense-prediction", "multi-task"]} | head, license=license
        )
        return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{write_card(self, origin, license)}")

    def _are_in(self, path: Path) -> bool:
        """Whether a safetensors file holds these very weights."""
        try:
            with safe_open(path, framework="pt") as file:
                kept = {key: file.get_tensor(key) for key in list(file.keys())}
        except (OSError, SafetensorError):
            return False
        own, kept = dict(self._weights()), upgraded_weights(kept, self, read_format(path.with_name(CONFIG_FILE)))
        return own.keys() == kept.keys() and all(
            value.dtype == kept[key].dtype and torch.equal(value, kept[key]) for key, value in own.items()
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **options: Any) -> MultiTaskModel:
        """The saved model in eval mode: `pamm.load_model` with its options, which are those of the hub mixin."""
        from pamm.models.saved import load_model

        return load_model(pretrained_model_name_or_path, **options)


@cache
def _one_thread_in_forked_children() -> None:
    """From now on a forked child computes on one thread.

    The threads of OpenMP, which computed here or will, do not live on in it: its first product would wait for them for ever.
    """
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def resize(x: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, C, h, w) → (B, C, *size), bilinear, in float32 (as every task's loss expects)."""
    x = x.float()
    return (
        x if tuple(x.shape[-2:]) == tuple(size) else F.interpolate(x, size=size, mode="bilinear", align_corners=False)
    )


def resize_rows(logits: Tensor, size: tuple[int, int], rows: range) -> Tensor:
    """These rows of (1, C, h, w) resized bilinearly to `size` (half-pixel centres)."""
    height = logits.shape[-2]
    if tuple(logits.shape[-2:]) == tuple(size):
        return logits[..., rows.start : rows.stop, :]
    position = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * (height / size[0]) - 0.5
    position = position.clamp(0, height - 1)
    above = position.long()
    weight = (position - above)[:, None].to(logits)
    above = above.to(logits.device)
    lines = torch.lerp(logits[..., above, :], logits[..., (above + 1).clamp(max=height - 1), :], weight)
    lines = lines.contiguous(
        memory_format=torch.channels_last
    )  # a pixel's logits side by side: argmax is 3 times faster
    return F.interpolate(lines, size=(len(rows), size[1]), mode="bilinear", align_corners=False)
