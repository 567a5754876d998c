"""Docstrings of public names: every parameter stands under Args, every result under Returns or Yields."""

from __future__ import annotations

import ast
import dataclasses
import importlib
import inspect
import re
import textwrap
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import pytest

ROOMS = (
    "pamm",
    "pamm.data",
    "pamm.images",
    "pamm.kernels",
    "pamm.official",
    "pamm.ops",
    "pamm.prediction",
    "pamm.tasks",
)
"""Modules whose `__all__` is public."""

ENTRY_POINTS = {
    "pamm.ablate.cost": ("count_cost",),
    "pamm.ablate.runs": ("make_plan", "train_all"),
    "pamm.ablate.tables": ("get_table",),
    "pamm.build": ("create_model", "create_tasks"),
    "pamm.config.experiment": ("Experiment", "check", "dump", "load"),
    "pamm.config.recipes": ("get_recipe",),
    "pamm.evaluation.boundaries.measure": ("BoundaryScores", "measure_folders", "measure_image"),
    "pamm.evaluation.evaluate": ("Evaluation", "evaluate", "evaluate_saved", "evaluate_split"),
    "pamm.evaluation.gain": ("compare", "multi_task_gain"),
    "pamm.look.features": ("look_at_features", "principal_components", "read_features"),
    "pamm.look.predictions": ("compare",),
    "pamm.look.readout": ("reading",),
    "pamm.look.router": ("RouterWeights", "router_weights"),
    "pamm.look.scans": ("draw_scan", "orders_of", "scan_figure"),
    "pamm.models.backbone": ("Backbone", "Swin", "ViT", "create_backbone", "register_backbone"),
    "pamm.models.invpt": ("InvPTDecoder",),
    "pamm.models.mlore": ("MLoREDecoder",),
    "pamm.models.mtmamba": ("DenseHead", "LiteHead", "MTMambaDecoder"),
    "pamm.models.pamm": ("ConvHead", "PAMMDecoder"),
    "pamm.models.pamm_released": ("ReleasedDecoder",),
    "pamm.models.taskprompter": ("TaskPrompterDecoder",),
    "pamm.models.registry": ("build_model", "register_decoder"),
    "pamm.nn.replace": ("replace_modules", "taking_over"),
    "pamm.nn.serialize": ("curve", "scan_orders"),
    "pamm.nn.ssm": ("init_A_log", "init_D", "init_delta_bias", "init_delta_weight"),
    "pamm.nn.task_layers": ("TaskConv3x3", "TaskLayerNorm", "TaskLinear"),
    "pamm.nn.window_attention": ("WindowAttention",),
    "pamm.ops.selective_scan": ("choose", "explain", "register_engine"),
    "pamm.tasks.metrics": ("image_metric", "sum_metric"),
    "pamm.training.demo": ("run_demo",),
    "pamm.training.run": ("train",),
}
"""Module → further functions and classes that users and authors of plug-ins call."""

SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.M)


def sections(thing: Any) -> dict[str, str]:
    """The sections of a docstring by name; what stands before the first is under ""."""
    first, *parts = SECTION.split(inspect.cleandoc(thing.__doc__ or ""))
    return {"": first} | dict(zip(parts[::2], parts[1::2], strict=True))


def documented(text: str) -> set[str]:
    """Names at the beginning of a section's entries."""
    entries = re.findall(r"^    (\*{0,2}\w+(?:, \*{0,2}\w+)*):", text, re.M)
    return {name.strip("*") for names in entries for name in names.split(", ")}


def parameters(function: Callable) -> list[str]:
    return [name for name in inspect.signature(function).parameters if name not in ("self", "cls")]


def fields_with_a_text(kind: type) -> set[str]:
    """Fields of a dataclass that are followed by a string, which `--help` shows."""
    found = set()
    for base in kind.__mro__:
        if not base.__module__.startswith("pamm"):
            continue
        body = ast.parse(textwrap.dedent(inspect.getsource(base))).body[0].body
        for field, text in pairwise(body):
            if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                found.add(field.target.id)
    return found


def public() -> Iterator[tuple[str, Any]]:
    """Every public function and class by its name, each once, and the methods that a class of this package defines."""
    seen = set()
    for room, names in [*((room, importlib.import_module(room).__all__) for room in ROOMS), *ENTRY_POINTS.items()]:
        for name in names:
            thing = getattr(importlib.import_module(room), name)
            known = inspect.isclass(thing) or inspect.isroutine(thing)
            if known and thing.__module__.startswith("pamm") and thing not in seen:
                seen.add(thing)
                yield f"{room}.{name}", thing
                yield from methods(f"{room}.{name}", thing) if inspect.isclass(thing) else ()


def methods(path: str, kind: type) -> Iterator[tuple[str, Any]]:
    """Methods of a class but for those that a base class documents."""
    for name, value in vars(kind).items():
        own = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
        shown = name in ("__call__", "__getitem__") or not name.startswith("_")
        if inspect.isfunction(own) and shown and not any(name in vars(base) for base in kind.__mro__[1:]):
            yield f"{path}.{name}", own


PUBLIC = dict(public())


def missing(thing: Any) -> list[str]:
    """What the docstring of a function or class lacks."""
    text = sections(thing)
    names = documented(text.get("Args", ""))
    lacking = [] if text[""] else ["a docstring"]
    if inspect.isclass(thing):
        if dataclasses.is_dataclass(thing):
            names |= documented(text.get("Attributes", "")) | fields_with_a_text(thing)
        elif "__init__" not in vars(thing) or issubclass(thing, Exception):
            return lacking
        return lacking + [name for name in parameters(thing) if name not in names]
    lacking += [name for name in parameters(thing) if name not in names]
    returned = inspect.signature(thing).return_annotation
    nothing = returned in (None, "None", "NoReturn", inspect.Signature.empty)
    return lacking if nothing or {"Returns", "Yields"} & text.keys() else [*lacking, "Returns"]


@pytest.mark.parametrize("name", PUBLIC)
def test_parameters_and_results_are_described(name):
    assert not missing(PUBLIC[name])
