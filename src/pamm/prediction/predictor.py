"""Any image in, maps at its size out."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from pamm.data.transforms import normalize
from pamm.files import shown
from pamm.kernels import Choice
from pamm.kernels.prepare import prepare
from pamm.models.model import MultiTaskModel, resize_rows
from pamm.models.saved import load_model
from pamm.prediction.inputs import ImageLike, PredictError, to_array
from pamm.prediction.maps import STRIP_VALUES, Maps
from pamm.runtime.distributed import default_device
from pamm.runtime.memory import keep_memory
from pamm.runtime.precision import choose_precision
from pamm.tasks import Task


class Predictor:
    """A network that takes any image.

    - An image is shrunk with antialiasing if its longer side exceeds `longest_side`. It is never enlarged, because a network
      learns the scale of its images.
    - It is centred and padded with the mean colour to multiples of the backbone's stride.
    - The logits are cropped, resized bilinearly to the image's own size and decoded there. Memory beside the maps does not
      grow with the image.

    Args:
        source: a model, or anything that `pamm.load_model` takes (run folder, saved model, hub repository). A given model is not
            changed.
        device: a torch device, or "auto": a given model's own device; otherwise CUDA, Apple's MPS or the CPU, the first
            available.
        longest_side: the largest side of an image for the network, pixels; default the longer side of the size that the network
            was built for.
        precision: "fp32" gives the checkpoint's own numbers; "bf16"; "fp16"; "auto" is bf16 on a CPU with units for it, else
            fp32.
        compile: run the network through torch.compile, which is worthwhile for many images of one size.
        kernels: "auto" uses faster modules in the place of the network's own (see `pamm.accelerate`; results differ by
            rounding), "off" does not.

    Raises:
        PredictError: an argument is not valid.
        CheckpointError: the saved model cannot be loaded.
    """

    def __init__(
        self,
        source: str | Path | MultiTaskModel,
        *,
        device: str | torch.device = "auto",
        longest_side: int | None = None,
        precision: str = "fp32",
        compile: bool = False,  # noqa: A002
        kernels: Choice = "auto",
    ):
        if longest_side is not None and longest_side < 1:
            raise PredictError(f"longest_side is {longest_side}, expected a number of pixels, e.g. 512")
        given = isinstance(source, nn.Module)
        if given and not isinstance(getattr(source, "_orig_mod", source), MultiTaskModel):
            raise PredictError(
                f"found a {type(source).__name__}, expected a network of pamm; of a wrapped one give what it holds, e.g. "
                "wrapper.module"
            )
        chosen = _choose_device(device, next(source.parameters()).device if given else None)
        if chosen.type == "cpu":
            keep_memory()
        lower = choose_precision(precision, chosen) != torch.float32
        network = load_model(source) if not given else source
        odd = (
            network.half_precision is None and network.dtype != torch.float32
        )  # after .half(), .double(): its values, in float32
        alone = given and (lower or odd or compile or kernels != "off")
        model = _copy_of(network, chosen, tensors=lower or odd) if alone else network
        model = (model.float() if odd else model).to(chosen)
        self.model = prepare(model, precision=precision, compile=compile, kernels=kernels)
        _check_finite(self.model, source)
        self.device = chosen
        self._process = os.getpid()
        self.longest_side = longest_side or max(self.model.image_size)

    @property
    def tasks(self) -> dict[str, Task]:
        """The tasks the network predicts, in order."""
        return self.model.tasks

    def __call__(self, image: ImageLike) -> Maps:
        """Predict one image.

        Args:
            image: a path or an open file; a PIL image (its EXIF orientation is applied); an (H, W, 3) RGB or (H, W) grey array of
                uint8 or uint16 (0..65535); a (3, H, W) or (1, H, W) uint8 tensor.

        Returns:
            The maps, at the image's own size.

        Raises:
            ImageError: the file is not a readable image.
            PredictError: another input that is not an image, or an output that is not finite.
        """
        pixels = to_array(image)
        source = Path(image) if isinstance(image, (str, os.PathLike)) else None
        return Maps(pixels, self._predict(pixels), self.tasks, source=source)

    def many(self, images: Iterable[ImageLike]) -> Iterator[Maps]:
        """Predict several images. An image is read when its maps are requested.

        Args:
            images: the images.

        Yields:
            The maps of one image after the other.

        Raises:
            ImageError: an image cannot be read.
            PredictError: an image cannot be predicted.
        """
        return map(self, images)

    @torch.no_grad()
    def logits(self, pixels: np.ndarray) -> tuple[dict[str, Tensor], slice, slice]:
        """Run the network on the padded frame of one image.

        Args:
            pixels: (H, W, 3) uint8 RGB.

        Returns:
            Task → (1, channels, h, w) logits of the frame; the image's rows in it; its columns.
        """
        if self.device.type != "cpu" and os.getpid() != self._process:
            raise PredictError(
                f"the predictor was loaded on {self.device} before this process was forked, and {self.device} does not work in a "
                "forked process; load it in each worker (gunicorn: without --preload), or on the CPU (device='cpu')"
            )
        shown = shrink(pixels, self.longest_side)
        frame, top, left = pad(normalize(shown.transpose(2, 0, 1))[None], self.model.stride)
        with _evaluating(self.model):
            logits = self.model(frame.to(self.device))
        for task, values in logits.items():
            if not values.isfinite().all():
                raise PredictError(
                    f"the network's output for '{task}' is not finite: {int((~values.isfinite()).sum())} of {values.numel()} "
                    "values are NaN or infinite. The training diverged or half precision overflowed: use an earlier checkpoint, "
                    "or float32"
                )
        return logits, slice(top, top + shown.shape[0]), slice(left, left + shown.shape[1])

    def _predict(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        logits, rows, columns = self.logits(pixels)
        size = pixels.shape[:2]
        return {name: decode(task, logits[name][..., rows, columns], size) for name, task in self.tasks.items()}


def shrink(pixels: np.ndarray, longest_side: int) -> np.ndarray:
    """(H, W, 3) uint8 → its longer side at most `longest_side`, in proportion, antialiased; no side below 1 pixel."""
    height, width = pixels.shape[:2]
    factor = longest_side / max(height, width)
    if factor >= 1:
        return pixels
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.asarray(Image.fromarray(pixels).resize(size, Image.Resampling.BILINEAR))


def pad(frame: Tensor, stride: int) -> tuple[Tensor, int, int]:
    """(1, 3, H, W) → zeros around it up to multiples of `stride`, and the row and column of its first pixel there."""
    height, width = frame.shape[-2:]
    top, left = -height % stride // 2, -width % stride // 2
    sides = (left, -width % stride - left, top, -height % stride - top)
    return F.pad(frame, sides), top, left


def decode(task: Task, logits: Tensor, size: tuple[int, int]) -> np.ndarray:
    """(1, channels, h, w) logits → the prediction at `size`, in strips of rows, so that the resized logits stay small."""
    height, width = size
    rows = max(1, STRIP_VALUES // (logits.shape[1] * width))
    prediction: np.ndarray | None = None
    for top in range(0, height, rows):
        strip = resize_rows(logits, size, range(top, min(top + rows, height)))
        part = task.decode(strip)[0].cpu().numpy()
        if prediction is None:
            prediction = np.empty((height, *part.shape[1:]), part.dtype)
        prediction[top : top + rows] = part
    assert prediction is not None  # an image has rows
    return prediction


def _copy_of(model: MultiTaskModel, device: torch.device, *, tensors: bool) -> MultiTaskModel:
    """The model with modules of its own; with the same parameters and buffers, unless `tensors` or the device is another."""
    own = [*model.parameters(), *model.buffers()]
    shared = not tensors and all(tensor.device == device for tensor in own)
    return copy.deepcopy(model, {id(tensor): tensor for tensor in own} if shared else None)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Context manager: eval mode during a prediction, also in the middle of training."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def _check_finite(model: nn.Module, source: object) -> None:
    """Raise PredictError where weights are NaN or infinite: what they would predict is nothing, or wrong without a word."""
    wrong = [key for key, value in model.state_dict().items() if not value.isfinite().all()]
    if wrong:
        where = "the model" if isinstance(source, nn.Module) else shown(source, 300)
        raise PredictError(
            f"{where} holds weights that are NaN or infinite, in {len(wrong)} tensors, e.g. {shown(wrong[0])}: the training "
            "diverged, or the file is damaged. Use an earlier checkpoint"
        )


def _choose_device(device: str | torch.device, own: torch.device | None) -> torch.device:
    if device == "auto":
        return own or torch.device(default_device())
    try:
        chosen = torch.device(device)
        torch.empty(0, device=chosen)
    except (RuntimeError, AssertionError) as error:
        told = (str(error).splitlines() or ["no reason given"])[0]
        raise PredictError(f"device '{device}' cannot be used here ({told}); use --device auto or cpu") from None
    return chosen
