"""Names that a user gives: a recipe, a recipe with variants, a file of an experiment, a folder of images and labels."""

from __future__ import annotations

import os
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path

from pamm.config.experiment import DataConfig, Experiment, load
from pamm.config.recipes.experiments import RECIPES
from pamm.config.recipes.variants import nearest, with_variants
from pamm.config.strict import ConfigError

RENAMED = {"mosaic-pamm": "folder-pamm"}
"""Recipe's earlier name → its name; experiment.yaml files of runs under the earlier name load and go on as they are."""


def get_recipe(name: str) -> Experiment:
    """A named experiment.

    Args:
        name: name of a recipe, e.g. "demo" or "pascal-pamm-b+no-priors".

    Returns:
        The experiment.

    Raises:
        ConfigError: the name is unknown; the message gives the nearest ones.
    """
    base, *variants = name.split("+")
    if base not in RECIPES:
        raise ConfigError(_unknown(base))
    return replace(with_variants(RECIPES[base](), variants, base), name=name)


def list_recipes(pattern: str = "") -> list[str]:
    """The recipes' names.

    Args:
        pattern: only names that match it, as in a shell, e.g. "nyud*"; without * ? [ ], only names that hold it.

    Returns:
        The names, in the order of `pamm recipes`.
    """
    wanted = pattern if re.search(r"[*?\[\]]", pattern) else f"*{pattern}*"
    return [name for name in RECIPES if fnmatchcase(name, wanted)]


def named_experiment(name: str, root: str | None = None) -> Experiment:
    """A recipe's name or an experiment.yaml, with variants, → the experiment, with another data root if one is given."""
    derived = re.fullmatch(r"(.+\.ya?ml)\+(.+)", name)
    if derived:
        path, variants = Path(derived[1]), derived[2]
        experiment = with_variants(load(path), variants.split("+"), str(path))
        experiment = replace(experiment, name=f"{experiment.name}+{variants}")
    else:
        path = Path(name)
        experiment = load(path) if path.suffix in (".yaml", ".yml") else get_recipe(name)
    return replace(experiment, data=replace(experiment.data, root=root)) if root else experiment


PACKAGES = {"gt_sets": "nyud-pamm-b", "JPEGImages": "pascal-pamm-b", "leftImg8bit": "cityscapes-mtmamba"}
"""Folder by which a public data set is known → a recipe on it."""


def named_data(name: str, root: str | None = None) -> Experiment:
    """A folder, a recipe's name or an experiment.yaml → an experiment on its data set, with another root if one is given.

    What holds a slash is a path; another name is a recipe, if there is one, before it is a folder. Raises ConfigError.
    """
    folder = Path(name).expanduser()
    is_path = name in (".", "..") or name.startswith("~") or "/" in name or os.sep in name
    is_yaml = re.fullmatch(r".+\.ya?ml(\+.+)?", name) and not folder.is_dir()
    is_recipe = name.partition("+")[0] in {**RECIPES, **RENAMED}
    if folder.name == "dataset.yaml" and folder.is_file():
        raise ConfigError(f"{name} describes a data set, of which the folder is read: pamm data {folder.parent}")
    if is_yaml or not (is_path or (folder.is_dir() and not is_recipe)):
        return named_experiment(name, root)
    if root is not None:
        raise ConfigError(f"--data.root {root} and the folder {name} are both given; give the data set's folder once")
    if not folder.is_dir():
        raise ConfigError(
            f"no folder {name}; give a folder that holds train/images/ and val/images/, or a recipe's name"
        )
    package = next((recipe for part, recipe in PACKAGES.items() if (folder / part).is_dir()), None)
    if package:
        return named_experiment(package, str(folder))
    if (folder / "experiment.yaml").is_file() and not (folder / "train").is_dir():
        raise ConfigError(f"{name} is a run's folder; for the data of that run: pamm data {folder / 'experiment.yaml'}")
    return Experiment(data=DataConfig(name="folder", root=str(folder)))


def _unknown(name: str) -> str:
    """The message for a name that is no recipe's."""
    if name in RENAMED:
        return f"the recipe '{name}' is called '{RENAMED[name]}' now; give its data with --data.root FOLDER"
    text = f"unknown recipe '{name}'.{nearest(name, RECIPES)}"
    if name and Path(name).is_dir():
        text += f" {name} is a folder: name a recipe and give the folder as its data, e.g. folder-pamm with --data.root {name}."
    return f"{text} Known recipes: {', '.join(RECIPES)}"
