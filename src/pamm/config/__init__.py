"""What an experiment is: its options and their limits, recipes, strict reading of YAML. Nothing here needs torch."""
