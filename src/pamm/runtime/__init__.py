"""The resources of this process: memory, arithmetic, worker processes and the other processes of a run."""
