"""A metric whose sums take long for each image: worker processes share the images while the network runs on."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torchmetrics import Metric
from tqdm import tqdm

from pamm.runtime.workers import serve_parent
from pamm.tasks.metrics.sums import SumMetric

if TYPE_CHECKING:
    from pamm.tasks.metrics import Sums

FEW = 4
"""Images for which no process is started."""
BACKLOG = 16
"""Images that may wait, per process."""
SHOWN = 32
"""Waiting images from which on a terminal shows a progress bar."""


class ImageMetric(SumMetric):
    """As SumMetric, with `prepare` (one image's logits and label → arrays) and `work` (these → sums) for `measure`.

    `check` raises an error for a batch of logits that cannot be measured.

    `work` runs in other processes, so it must be importable there; its sums are whole numbers, so their order is of no
    matter.
    """

    def __init__(
        self,
        check: Callable[[Tensor], None],
        prepare: Callable[[Tensor, Tensor], tuple[np.ndarray, ...]],
        work: Callable[..., Mapping[str, np.ndarray]],
        scores: Callable[[Sums], Sums],
        empty: Sums,
    ):
        super().__init__(prepare, scores, empty)
        self.check = check
        self.work = work
        self.waiting: deque[tuple[np.ndarray, ...]] = deque()
        self.running: deque[Future] = deque()
        self.pool: ProcessPoolExecutor | None = None

    @torch.no_grad()
    def update(self, logits: Tensor, label: Tensor) -> None:
        """(B, channels, H, W) logits of any float type and (B, c, H, W) label; the work may be done later."""
        self.check(logits)
        self.waiting.extend(self.measure(*pair) for pair in zip(logits, label, strict=True))
        workers = processes()
        if len(self.waiting) <= FEW or workers == 1:
            return
        if self.pool is None:
            method = "fork" if sys.platform == "linux" else "spawn"
            self.pool = ProcessPoolExecutor(workers, multiprocessing.get_context(method), serve_parent)
        while self.waiting:
            self.running.append(self.pool.submit(self.work, *self.waiting.popleft()))
        while len(self.running) > BACKLOG * workers:
            self.add(self.running.popleft().result())

    def add(self, sums: Mapping[str, np.ndarray]) -> None:
        """Add one image's sums to the states."""
        for name, value in sums.items():
            setattr(self, name, getattr(self, name) + torch.from_numpy(np.asarray(value)).to(self.device))

    def finish(self) -> None:
        """Do all work that waits, here or in the pool, and end the pool."""
        total = len(self.waiting) + len(self.running)
        with tqdm(total=total, desc="boundaries", leave=False, disable=total < SHOWN or not sys.stderr.isatty()) as bar:
            while self.waiting:
                self.add(self.work(*self.waiting.popleft()))
                bar.update()
            while self.running:
                self.add(self.running.popleft().result())
                bar.update()
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.shutdown(cancel_futures=True)
            self.pool = None

    def sync(self, *arguments: Any, **options: Any) -> None:
        """Add up over the processes of distributed training, once this one's work is done."""
        self.finish()
        super().sync(*arguments, **options)

    def merge_state(self, incoming_state: Metric | dict[str, Any]) -> None:
        """Add the sums of another metric."""
        self.finish()
        if isinstance(incoming_state, ImageMetric):
            incoming_state.finish()
        super().merge_state(incoming_state)

    def __getstate__(self) -> dict[str, Any]:
        """A copy has no work that waits."""
        self.finish()
        return super().__getstate__()

    def compute(self) -> dict[str, Tensor]:
        self.finish()
        return super().compute()

    def reset(self) -> None:
        self.waiting.clear()
        self.running.clear()
        self.close()
        super().reset()


def processes() -> int:
    """Worker processes for this process: the cores it may use, shared with the others on this machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
