"""What this process runs on: memory, arithmetic, worker processes and the other processes of a run."""
