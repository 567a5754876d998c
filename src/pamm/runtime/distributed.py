"""The processes of a run, one per device: their ranks, their communication and their start."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from pamm.config.strict import ConfigError
from pamm.files import first_line
from pamm.runtime.memory import keep_memory
from pamm.runtime.precision import choose_precision

if TYPE_CHECKING:
    from lightning_fabric import Fabric

    from pamm.config.experiment import TrainConfig


def is_first_process() -> bool:
    """Whether this process prints, of those that Fabric, torchrun or SLURM started."""
    return all(int(os.environ.get(key, 0)) == 0 for key in ("RANK", "LOCAL_RANK", "NODE_RANK", "SLURM_PROCID"))


def world_size() -> int:
    """Number of processes that share the batch; 1 outside distributed training."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def joined_draw(draw: Callable[[int], Tensor], batch: int) -> Tensor:
    """This process's rows of a random draw for the joined batch.

    `draw(n)` returns random values whose first dimension is n. Every process must hold the same state of the default
    random generator, as the training loop's seeding per step makes it; then all draw the same n rows and each keeps its own.
    """
    world = world_size()
    if world == 1:
        return draw(batch)
    return draw(batch * world)[dist.get_rank() * batch : (dist.get_rank() + 1) * batch]


def summed(values: Tensor) -> Tensor:
    """The sum of all processes' tensors."""
    if world_size() > 1:
        dist.all_reduce(values)
    return values


def gathered(own: list[Any]) -> list[list[Any]]:
    """Every process's list, in the order of the processes."""
    if world_size() == 1:
        return [own]
    shares: list[list[Any]] = [[]] * world_size()
    dist.all_gather_object(shares, own)
    return shares


def launch(config: TrainConfig) -> Fabric:
    """Start Fabric with the configured processes, or join those that torchrun or SLURM started. Raises ConfigError."""
    from lightning_fabric import Fabric

    devices, nodes = started_outside() or (config.devices, config.nodes)
    kind = default_device() if config.device == "auto" else config.device
    half = choose_precision(config.precision, kind) != torch.float32
    try:
        fabric = Fabric(
            accelerator=config.device,
            devices=devices,
            num_nodes=nodes,
            strategy="ddp" if devices * nodes > 1 else "auto",
            precision="bf16-mixed" if half else "32-true",
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"train.device = {config.device}, train.devices = {config.devices} cannot be used here "
            f"({first_line(error)}). `pamm doctor` lists the devices; --device cpu runs everywhere"
        ) from error
    fabric.launch()
    if fabric.device.type == "cpu":
        keep_memory()
    return fabric


def default_device() -> str:
    """The kind of device that "auto" means: CUDA, Apple's MPS or the CPU, the first there is."""
    kinds = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    return next(kind for kind, there in kinds.items() if there)


def started_outside() -> tuple[int, int] | None:
    """(processes per node, nodes) where torchrun or `srun` has started them, else None."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        local = int(os.environ["LOCAL_WORLD_SIZE"])
        return local, int(os.environ["WORLD_SIZE"]) // local
    if "SLURM_PROCID" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        nodes = int(os.environ.get("SLURM_NNODES", 1))
        return int(os.environ.get("SLURM_NTASKS", 1)) // nodes, nodes
    return None
