"""Training: a run's folder, its steps, and the files from which it goes on."""
