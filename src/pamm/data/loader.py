"""Batches as a function of the step: the same bits for any number of workers, and in a resumed run."""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from pamm.config.experiment import check_batch
from pamm.data.sample import Batch, DataError, Dataset, Sample, collate
from pamm.data.transforms import EvalTransform, TrainTransform
from pamm.files import shown
from pamm.runtime.workers import WorkerError, data_worker_ended, serve_training
from pamm.tasks import Task

if TYPE_CHECKING:
    from pamm.config.experiment import TrainConfig

LONGEST_TEMPORARY = 70
"""Bytes; multiprocessing adds 32 to them, and a socket's address has 103 on macOS, 107 on Linux."""


class StepSampler:
    """Positions that one process reads, optimizer step after optimizer step.

    Global positions count through one permutation of the data set after another, each drawn from (seed, epoch). Step t
    takes positions [t·batch, (t + 1)·batch); rank r of `world` takes the r-th of its equal contiguous parts, itself cut
    into `accumulate` equal parts. Raises ConfigError where the batch cannot be cut so.
    """

    def __init__(self, length: int, config: TrainConfig, *, rank: int = 0, world: int = 1, start_step: int = 0):
        if length == 0:
            raise DataError("the training split has no image")
        check_batch(config, world)
        parts = world * config.accumulate
        self.length, self.seed, self.steps, self.start = length, config.seed, config.steps, start_step
        self.batch, self.accumulate, self.part = config.batch, config.accumulate, config.batch // parts
        self.offset = rank * config.accumulate * self.part
        self._epoch, self._order = -1, np.empty(0, np.int64)

    def __len__(self) -> int:
        return max(0, self.steps - self.start) * self.accumulate

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        """One list of (epoch, index of the sample) per part of a step."""
        for step in range(self.start, self.steps):
            for number in range(self.accumulate):
                first = step * self.batch + self.offset + number * self.part
                yield [self.locate(position) for position in range(first, first + self.part)]

    def locate(self, position: int) -> tuple[int, int]:
        """Global position → (epoch, index of the sample)."""
        epoch, place = divmod(position, self.length)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, np.random.default_rng((0, self.seed, epoch)).permutation(self.length)
        return epoch, int(self._order[place])


class TrainLoader:
    """Iterating yields one list of `config.accumulate` batches per optimizer step."""

    def __init__(self, sampler: StepSampler, loader: DataLoader):
        self.sampler = sampler
        self._loader = loader

    def __len__(self) -> int:
        return len(self.sampler) // self.sampler.accumulate

    def __iter__(self) -> Iterator[list[Batch]]:
        parts: list[Batch] = []
        for loaded in _batches(self._loader):
            parts.append(_checked(loaded))
            if len(parts) == self.sampler.accumulate:
                yield parts
                parts = []


class EvalLoader:
    """Iterating yields batches of one process's share of a split."""

    def __init__(self, loader: DataLoader):
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Batch]:
        for loaded in _batches(self._loader):
            yield _checked(loaded)


def train_loader(
    dataset: Dataset,
    transform: TrainTransform,
    config: TrainConfig,
    *,
    rank: int = 0,
    world: int = 1,
    start_step: int = 0,
) -> TrainLoader:
    """Batches of the steps `start_step` to `config.steps` for process `rank` of `world`.

    Step t depends only on (config.seed, config.batch, world, rank, t) and the data: not on where training
    was resumed, nor on the number of workers. Raises ConfigError for a batch that cannot be shared equally; iterating
    raises DataError for data that cannot be read, also from inside a worker.
    """
    sampler = StepSampler(len(dataset), config, rank=rank, world=world, start_step=start_step)
    cuda = config.device in ("auto", "cuda") and torch.cuda.is_available()
    loader = _loader(
        _Train(dataset, transform), transform.tasks, config.workers, batch_sampler=sampler, pin_memory=cuda
    )
    return TrainLoader(sampler, loader)


def eval_loader(
    dataset: Dataset,
    transform: EvalTransform,
    *,
    rank: int = 0,
    world: int = 1,
    batch_size: int = 1,
    workers: int = 0,
) -> EvalLoader:
    """Batches of samples rank, rank + world, ... in order. Iterating raises DataError for data that cannot be read."""
    indices = range(rank, len(dataset), world)
    return EvalLoader(
        _loader(_Eval(dataset, transform), transform.tasks, workers, sampler=indices, batch_size=batch_size)
    )


class _Train(torch.utils.data.Dataset):
    """(epoch, index) → transformed sample, or the DataError's message: a worker's exception would arrive wrapped."""

    def __init__(self, dataset: Dataset, transform: TrainTransform):
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, place: tuple[int, int]) -> Sample | str:
        epoch, index = place
        try:
            return self.transform(self.dataset[index], epoch, index)
        except DataError as error:
            return str(error)


class _Eval(torch.utils.data.Dataset):
    """index → transformed sample, or the message of the DataError."""

    def __init__(self, dataset: Dataset, transform: EvalTransform):
        self.dataset = dataset
        self.transform = transform

    def __getitem__(self, index: int) -> Sample | str:
        try:
            return self.transform(self.dataset[index])
        except DataError as error:
            return str(error)


def _collate(samples: Sequence[Sample | str], tasks: Mapping[str, Task]) -> dict[str, Any] | str:
    """The batch as a plain dict, which PyTorch can pin, or the first error's message."""
    failure = next((sample for sample in samples if isinstance(sample, str)), None)
    return failure or vars(collate([sample for sample in samples if isinstance(sample, Sample)], tasks))


def _batches(loader: DataLoader) -> Iterator[dict[str, Any] | str]:
    """The loader's batches. Raises WorkerError if a process ended while it handed a batch over.

    A process that ended otherwise is torch's RuntimeError, see `pamm.runtime.workers.exhausted`.
    """
    iterator = iter(loader)
    while True:
        try:
            loaded = next(iterator)
        except StopIteration:
            return
        except (OSError, EOFError) as error:
            if not loader.num_workers:
                raise
            time.sleep(1)  # torch's handler of SIGCHLD raises its own error, with the cause, where a process has died
            raise WorkerError(data_worker_ended(str(error) or type(error).__name__)) from error
        yield loaded


def _checked(loaded: dict[str, Any] | str) -> Batch:
    if isinstance(loaded, str):
        raise DataError(loaded)
    return Batch(**loaded)


def _loader(dataset: torch.utils.data.Dataset, tasks: Mapping[str, Task], workers: int, **options: Any) -> DataLoader:
    """A DataLoader that draws its (unused) worker seeds from its own generator, not from torch's global one."""
    if workers:
        _check_sockets()
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=partial(_collate, tasks=tasks),
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=serve_training,
        **options,
    )


def _check_sockets() -> None:
    """Raise DataError where the folder of temporary files has too long a name: loading processes would wait for ever."""
    folder = tempfile.gettempdir()
    length = len(os.fsencode(folder))
    if sys.platform != "win32" and length > LONGEST_TEMPORARY:
        raise DataError(
            f"the folder of temporary files, {shown(folder, 200)}, has a name of {length} bytes; the sockets of loading processes "
            f"allow {LONGEST_TEMPORARY}. Set TMPDIR to a shorter one, or load without processes (--train.workers 0)"
        )
