"""Every reader of files that may come from a stranger, with sound files for it and ways to damage them."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
import yaml
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from scipy.io import savemat

from fuzz import damage
from pamm import official
from pamm.config.experiment import DataConfig, ExpertsConfig, ModelConfig, ReleasedConfig, check, load
from pamm.config.strict import ConfigError, to_dict
from pamm.data import DataError, dataset_options
from pamm.data.files import reading
from pamm.data.listing import read_ids
from pamm.data.pascal import read_label_map, read_objects
from pamm.evaluation.boundaries import BoundaryError
from pamm.evaluation.boundaries.files import read_map, read_truths
from pamm.evaluation.gain import GainError, baseline_scores
from pamm.images import ImageError, read_image
from pamm.models.formats import FIELD, FORMAT
from pamm.models.registry import build_model
from pamm.models.saved import CheckpointError, load_model
from pamm.official import OfficialError
from pamm.official.pamm import table
from pamm.tasks import TASKS, LabelError, create_task
from pamm.training.checkpoint import load_training
from pamm.training.log import Log
from tiny import BACKBONE, MODEL, experiment

Strategy = st.SearchStrategy[bytes]


@dataclass(frozen=True)
class Parser:
    """A reader, the file it reads, what it may raise, and how inputs are made of sound ones."""

    name: str
    file: str
    read: Callable[[Path], Any]
    errors: tuple[type[Exception], ...]
    sound: Callable[[], list[bytes]]
    damages: tuple[Callable[[bytes], Strategy], ...]
    others: Callable[[Path], None] = lambda folder: None
    """Writes the files that stand beside it."""

    def inputs(self) -> Strategy:
        """Contents of the file."""
        made = [damage_(content) for content in self.sound() for damage_ in self.damages]
        return st.one_of(*made, st.binary(max_size=64))

    def try_on(self, content: bytes, folder: Path) -> bool:
        """Read the content as a file in `folder`; whether it was taken. Raises whatever is no error of this package."""
        self.others(folder)
        path = folder / self.file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
        try:
            self.read(path)
        except self.errors as error:
            text = str(error)
            assert text and len(text) < 4000 and text.isprintable(), (
                f"a message that is not one short line: {text[:300]!r}"
            )
            return False
        return True


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings that tell a user what was taken for what."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            yield
    finally:
        logging.disable(logging.NOTSET)


# -- sound files ---------------------------------------------------------------------------------------------------------------


def saved_bytes(write: Callable[[io.BytesIO], None]) -> bytes:
    made = io.BytesIO()
    write(made)
    return made.getvalue()


@cache
def model_files() -> dict[str, bytes]:
    """A tiny saved model: config.json and model.safetensors."""
    model = build_model(
        MODEL, {"depth": create_task("depth"), "semseg": create_task("semseg", classes=["a", "b"])}, (16, 16)
    )
    settings = {FIELD: FORMAT} | model.settings
    return {"config.json": json.dumps(settings).encode(), "model.safetensors": save(dict(tensors(model)))}


def tensors(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from ((key, value.detach().contiguous()) for key, value in model.state_dict().items())


def write_model(folder: Path) -> None:
    for name, content in model_files().items():
        (folder / name).write_bytes(content)


@cache
def published() -> dict[str, torch.Tensor]:
    """A tiny released PAMM under its published names."""
    decoder = ReleasedConfig(width=32, state_size=4, kernel_size=3, experts=ExpertsConfig(count=3, top_k=2, rank=2))
    model = build_model(
        ModelConfig(replace(BACKBONE, class_token=False), decoder), {"depth": create_task("depth")}, (16, 16)
    )
    own = {name: value.detach() for name, value in model.state_dict().items()}
    return {
        key: place.collect(own).clone(memory_format=torch.contiguous_format)
        for key, place in table(own, ["depth"]).items()
    }


def published_files() -> list[bytes]:
    whole = {"model": {f"module.{key}": value for key, value in published().items()}, "epoch": 3}
    return [
        saved_bytes(lambda file: torch.save(whole, file)),
        saved_bytes(lambda file: torch.save(published(), file)),
    ]


def legacy_file() -> list[bytes]:
    return [saved_bytes(lambda file: torch.save(published(), file, _use_new_zipfile_serialization=False))]


STATE = {"step": 2, "evaluated": 0, "best_step": 0, "best": 1.0}


@cache
def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = build_model(
        MODEL, {"depth": create_task("depth"), "semseg": create_task("semseg", classes=["a", "b"])}, (16, 16)
    )
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    for _ in range(STATE["step"]):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    return model, optimizer


def training_file() -> list[bytes]:
    return [saved_bytes(lambda file: torch.save(STATE | {"optimizer": trained()[1].state_dict()}, file))]


def experiment_files() -> list[bytes]:
    return [yaml.safe_dump(to_dict(experiment(steps=steps))).encode() for steps in (4, 5)]


def description_files() -> list[bytes]:
    content = {
        "tasks": {"semseg": {"classes": ["sky", "tree"]}, "depth": {"unit": "metre"}},
        "splits": {"train": 0},
        "labelled": {"train": {"semseg": 0}},
        "description": "rooms",
    }
    return [yaml.safe_dump(content).encode()]


def results_files() -> list[bytes]:
    results = {"depth": {"RMSE": 0.5}, "semseg": {"mIoU": 40.0}}
    return [json.dumps({"results": results, "protocol": "frame", "original": {"results": results}}).encode()]


def log_files() -> list[bytes]:
    lines = [{"step": n, "kind": kind, "loss": 0.5 * n} for n in range(1, 4) for kind in ("train", "val")]
    return ["".join(json.dumps(line) + "\n" for line in lines).encode()]


def mat_file(name: str, value: Any) -> bytes:
    return saved_bytes(lambda file: savemat(file, {name: value}))


@cache
def annotation() -> bytes:
    mask = np.eye(6, 8, dtype=np.uint8)
    parts = np.array([[("head", mask), ("torso", mask)]], [("part_name", object), ("mask", object)])
    objects = np.array([[("person", 15, mask, parts)]], [(n, object) for n in ("class", "class_ind", "mask", "parts")])
    return mat_file("anno", {"imname": "a", "objects": objects})


def boundary_truth() -> bytes:
    cell = np.empty((1, 2), object)
    cell[0, 0] = cell[0, 1] = {"Segmentation": np.ones((6, 8), np.uint16), "Boundaries": np.eye(6, 8, dtype=np.uint8)}
    return mat_file("groundTruth", cell)


def array_file(dtype: str) -> bytes:
    return saved_bytes(lambda file: np.save(file, np.linspace(0, 1, 12).reshape(3, 4).astype(dtype)))


def picture(mode: str, form: str) -> bytes:
    grey = np.arange(48, dtype=np.uint8).reshape(6, 8)
    grey = {"P": grey % 3, "L": grey % 2 * 255}.get(mode, grey).astype(np.uint8)
    values = {"RGB": np.stack([grey] * 3, -1), "I;16": grey.astype(np.uint16) * 100}.get(mode, grey)
    image = Image.fromarray(values)
    if mode == "P":
        image.putpalette(bytes(range(9)))
    return saved_bytes(lambda file: (image.convert("1") if mode == "1" else image).save(file, form))


# -- readers -------------------------------------------------------------------------------------------------------------------


def read_experiment(path: Path) -> None:
    check(load(path))


def read_description(path: Path) -> None:
    dataset_options(DataConfig(name="folder", root=str(path.parent)))


def read_model(path: Path) -> None:
    with quiet():
        load_model(path.parent)


def read_published(path: Path) -> None:
    with quiet():
        official.load(path, image_size=(16, 16), num_heads=2)


def read_training(path: Path) -> None:
    with quiet():
        load_training(path.parent, *trained(), STATE)


def read_log(path: Path) -> None:
    Log(path.parent, 2, 2).close()


def read_truth(path: Path) -> None:
    for outline in (False, True):
        read_truths(path, outline=outline)


def read_list(path: Path) -> None:
    read_ids(path)


def read_results(path: Path) -> None:
    baseline_scores(str(path))


def label_of(task: str) -> Callable[[Path], None]:
    options = (
        {"classes": ["a", "b", "c"]} if "classes" in TASKS[task].__init__.__kwdefaults__ or task == "semseg" else {}
    )

    def read(path: Path) -> None:
        with reading():
            create_task(task, **options).read(path)

    return read


MAT, NPY, PNG = (damage.damaged, damage.in_mat), (damage.damaged, damage.in_npy), (damage.damaged, damage.in_png)


def text(load_: Callable[[str], Any], dump: Callable[[Any], bytes]) -> tuple[Callable[[bytes], Strategy], ...]:
    return (lambda content: damage.in_text(content, load_, dump),)


def as_yaml(tree: Any) -> bytes:
    return yaml.dump(tree, allow_unicode=True).encode(errors="replace")


def any_mat(name: str) -> Callable[[bytes], Strategy]:
    return lambda content: damage.mat_of(name)


YAML, JSON = text(yaml.safe_load, as_yaml), text(json.loads, damage.as_json)

PARSERS = {
    parser.name: parser
    for parser in (
        Parser("experiment.yaml", "experiment.yaml", read_experiment, (ConfigError,), experiment_files, YAML),
        Parser("dataset.yaml", "dataset.yaml", read_description, (DataError,), description_files, YAML),
        Parser(
            "config.json",
            "config.json",
            read_model,
            (CheckpointError,),
            lambda: [model_files()["config.json"]],
            JSON,
            write_model,
        ),
        Parser(
            "model.safetensors",
            "model.safetensors",
            read_model,
            (CheckpointError,),
            lambda: [model_files()["model.safetensors"]],
            (damage.damaged, damage.in_safetensors),
            write_model,
        ),
        Parser(
            "published .pth",
            "a.pth",
            read_published,
            (OfficialError, ConfigError),
            published_files,
            (damage.damaged, damage.in_zip),
        ),
        Parser(
            "published old form", "a.pth", read_published, (OfficialError, ConfigError), legacy_file, (damage.damaged,)
        ),
        Parser(
            "published .safetensors",
            "a.safetensors",
            read_published,
            (OfficialError, ConfigError),
            lambda: [save(published())],
            (damage.damaged, damage.in_safetensors),
        ),
        Parser(
            "training.pt",
            "training.pt",
            read_training,
            (CheckpointError,),
            training_file,
            (damage.damaged, damage.in_zip),
            write_model,
        ),
        Parser("log.jsonl", "log.jsonl", read_log, (), log_files, (damage.damaged,)),
        Parser("results.json", "results.json", read_results, (GainError,), results_files, JSON),
        Parser("list of ids", "val.txt", read_list, (DataError,), lambda: [b"a\nb c\n\xc3\xa9\n"], (damage.damaged,)),
        Parser("parts .mat", "a.mat", read_objects, (DataError,), lambda: [annotation()], (*MAT, any_mat("anno"))),
        Parser(
            "labels .mat",
            "a.mat",
            read_label_map,
            (DataError,),
            lambda: [mat_file("LabelMap", np.arange(12.0).reshape(3, 4))],
            (*MAT, any_mat("LabelMap")),
        ),
        Parser(
            "boundaries .mat",
            "a.mat",
            read_truth,
            (BoundaryError, LabelError),
            lambda: [boundary_truth()],
            (*MAT, any_mat("groundTruth")),
        ),
        Parser(
            "depth .npy", "a.npy", label_of("depth"), (DataError,), lambda: [array_file("f4"), array_file("f8")], NPY
        ),
        Parser("boundary map .npy", "a.npy", read_map, (BoundaryError, LabelError), lambda: [array_file("f4")], NPY),
        Parser(
            "boundary truth .npy", "a.npy", read_truth, (BoundaryError, LabelError), lambda: [array_file("u1")], NPY
        ),
        Parser("boundary map .png", "a.png", read_map, (BoundaryError, LabelError), lambda: [picture("L", "PNG")], PNG),
        *(
            Parser(
                f"label of {task}", "a.png", label_of(task), (DataError,), lambda mode=mode: [picture(mode, "PNG")], PNG
            )
            for task, mode in (("semseg", "P"), ("depth", "I;16"), ("normals", "RGB"), ("sal", "1"), ("edge", "L"))
        ),
        Parser(
            "image .png",
            "a.png",
            read_image,
            (ImageError,),
            lambda: [picture("RGB", "PNG"), picture("P", "PNG")],
            PNG,
        ),
        Parser(
            "image of other formats",
            "a.jpg",
            read_image,
            (ImageError,),
            lambda: [picture("RGB", form) for form in ("JPEG", "WEBP", "BMP", "TIFF", "GIF", "JPEG2000", "PPM")],
            (damage.damaged,),
        ),
    )
}


@contextmanager
def sandbox() -> Iterator[Path]:
    """A folder of its own for one input."""
    with TemporaryDirectory(prefix="pamm-fuzz-") as folder:
        yield Path(folder)
