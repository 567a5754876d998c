"""Named experiments.

A name may be followed by variants: `pascal-pamm-b+no-priors` is the row "no priors" of the paper's Table IV,
`pascal-pamm-b+s-scan+stages-2` combines two, and `nyud-mtmamba+swin-t` is a row of MTMamba's Table 6.
"""

from pamm.config.recipes import peers  # noqa: F401 (registers its recipes)
from pamm.config.recipes.experiments import RECIPES
from pamm.config.recipes.names import get_recipe, list_recipes, named_data, named_experiment
from pamm.config.recipes.variants import MTMAMBA_VARIANTS, VARIANTS, variants_of, with_variants

__all__ = [
    "MTMAMBA_VARIANTS",
    "RECIPES",
    "VARIANTS",
    "get_recipe",
    "list_recipes",
    "named_data",
    "named_experiment",
    "variants_of",
    "with_variants",
]
