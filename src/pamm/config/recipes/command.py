"""The command line of `pamm recipes`."""

from __future__ import annotations

import yaml

from pamm.command_line import parser
from pamm.config.recipes import MTMAMBA_VARIANTS, RECIPES, VARIANTS, get_recipe
from pamm.config.strict import to_dict


def main(arguments: list[str]) -> int:
    own = parser("recipes")
    own.add_argument("recipe", nargs="?", help="print this one as YAML")
    name = own.parse_args(arguments).recipe
    if name:
        print(yaml.safe_dump(to_dict(get_recipe(name)), sort_keys=False), end="")
        return 0
    width = max(map(len, [*RECIPES, *VARIANTS])) + 2
    systems: dict[str, list[str]] = {}
    for key, build in RECIPES.items():
        systems.setdefault(build().model.decoder.system, []).append(key)
    for system, keys in systems.items():
        print(f"recipes of {system}:")
        for key in keys:
            print(f"  {key:<{width}}{(RECIPES[key].__doc__ or '').strip().splitlines()[0]}")
    for example, variants in (("pascal-pamm-b+no-priors", VARIANTS), ("nyud-mtmamba+swin-t", MTMAMBA_VARIANTS)):
        print(f"\nvariants, as in {example}:")
        for key, (text, _) in variants.items():
            print(f"  {key:<{width}}{text}")
    return 0
