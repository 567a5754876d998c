"""Training: a run's folder, its steps, and its checkpoints."""
