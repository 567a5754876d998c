"""The processes of a run, one per device: started here by Lightning Fabric, or by torchrun or SLURM."""

from __future__ import annotations

import os

from lightning_fabric import Fabric

from pamm.experiment import TrainConfig
from pamm.memory import keep_memory
from pamm.models.saved import first_line
from pamm.strict import ConfigError


def launch(config: TrainConfig) -> Fabric:
    """Start Fabric with the configured processes, or join those that torchrun or SLURM started. Raises ConfigError."""
    devices, nodes = started_outside() or (config.devices, config.nodes)
    try:
        fabric = Fabric(
            accelerator=config.accelerator,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision=config.precision,
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"train.accelerator = {config.accelerator}, train.devices = {config.devices} cannot be used here "
            f"({first_line(error)}). `pamm doctor` lists the devices; --train.accelerator cpu runs everywhere"
        ) from error
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_memory()
    return fabric


def started_outside() -> tuple[int, int] | None:
    """(processes per node, nodes) where torchrun or `srun` has started them, else None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ.get("SLURM_NTASKS", 1)) // nodes, nodes
    return None
