"""Experiments: their options and limits, recipes, strict reading of YAML. Nothing here needs torch."""
