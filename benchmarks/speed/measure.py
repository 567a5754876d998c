"""Candidates measured in turn in one process, and the memory that one of them needs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from speed.machine import give_back, process_memory
from speed.operations import operations

VISIT = 0.25
"""Seconds of calls of one candidate before the next one's turn; at least one call."""


SHORT = 1.0
"""Seconds of a first call below which a second one gives the estimate."""


@dataclass(frozen=True)
class Candidate:
    """One way to do the work. `run` does it once and returns a tensor or tensors by name, by which candidates are compared."""

    run: Callable[[], Any]
    count_flops: bool = True
    """Whether its matrix products and convolutions are counted (counting slows down forms of many small calls)."""


@dataclass(frozen=True)
class Workload:
    """Candidates that compute the same, the one of this package first."""

    candidates: Mapping[str, Candidate]
    shape: Mapping[str, Any]
    """What determines the work, for the record."""
    images: int | None = None
    """Images per call, where the work has images."""
    steps: int | None = None
    """State-steps B·D·N·L·orders per call, of a scan."""
    memory_calls: int = 1
    """Calls until the most memory is in use (2 for training: the optimizer's state is made in the first step)."""
    floor: Callable[[], dict[str, Any]] | None = None
    """Measures the least time that a call can take on this machine."""


@dataclass
class Timing:
    """What was measured of one candidate."""

    seconds: list[float] = field(default_factory=list)
    """Every timed call."""
    cold: bool = False
    """Whether the only call is the first one, because it took too long to repeat."""
    flops: int | None = None
    difference: float | None = None
    """Largest difference of its first output from the first candidate's, relative to that one's largest value."""
    error: str | None = None

    def summary(self) -> dict[str, Any] | None:
        if not self.seconds:
            return None
        low, middle, high = np.percentile(self.seconds, [25, 50, 75])
        return {"median": middle, "q1": low, "q3": high, "calls": len(self.seconds), "cold": self.cold}


def in_turn(
    workload: Workload,
    *,
    rounds: int,
    budget: float,
    device: str,
    longest: float = 0.0,
    begin: Callable[[str], None] = lambda name: None,
) -> dict[str, Timing]:
    """Warm every candidate up once, then give each its turn, `rounds` times or until it has used `budget` seconds.

    A first call of more than `longest` (and `budget`) seconds is the only one. A candidate that raises leaves the others
    running; `begin` is told the name before every turn.
    """
    found = {name: Timing() for name in workload.candidates}
    first: Any = None
    for name, candidate in workload.candidates.items():
        begin(name)
        output = _warm_up(candidate, found[name], max(budget, longest), device)
        if first is None:
            first = output
        elif output is not None:
            found[name].difference = difference(output, first)
        del output
    estimate = {name: timing.seconds.pop() for name, timing in found.items() if timing.seconds and not timing.cold}
    for _ in range(rounds):
        for name in estimate:
            timing = found[name]
            expected = timing.seconds[-1] if timing.seconds else estimate[name]
            if timing.error or (timing.seconds and sum(timing.seconds) + expected > budget):
                continue
            begin(name)
            _visit(workload.candidates[name], timing, expected, device)
    return found


def _warm_up(candidate: Candidate, timing: Timing, longest: float, device: str) -> Any:
    """The first call: counts operations, gives the estimate (`timing.seconds`) and the output, which is returned."""
    counter = operations() if candidate.count_flops else None
    try:
        if counter is None:
            output, taken = _timed(candidate.run, device)
        else:
            with counter:
                output, taken = _timed(candidate.run, device)
            timing.flops = counter.get_total_flops()
            if taken < SHORT:  # what was allocated or compiled in the first call is not the estimate
                output, taken = _timed(candidate.run, device)
    except Exception as error:
        timing.error = told(error)
        return None
    timing.cold = taken > longest
    timing.seconds.append(taken)
    return output


def _visit(candidate: Candidate, timing: Timing, expected: float, device: str) -> None:
    """One turn: fast candidates first run once untimed, since the one before has emptied the caches."""
    calls = max(1, min(200, int(VISIT / max(expected, 1e-6))))
    try:
        if calls > 1:
            candidate.run()
        for _ in range(calls):
            timing.seconds.append(_timed(candidate.run, device)[1])
    except Exception as error:
        timing.error = told(error)


def _timed(run: Callable[[], Any], device: str) -> tuple[Any, float]:
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    wait()
    start = time.perf_counter()
    output = run()
    wait()
    return output, time.perf_counter() - start


def told(error: Exception) -> str:
    """An exception in one line."""
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0] if text else 'no message'}"[:300]


def difference(output: Any, reference: Any) -> float | None:
    """Largest |output − reference| over the largest |reference|, the worst of the tensors; None for outputs of another kind."""
    if isinstance(output, Mapping) != isinstance(reference, Mapping):
        return None
    pairs = [(a.detach().float(), b.detach().float()) for a, b in zip(tensors(output), tensors(reference), strict=True)]
    worst = [((a - b).abs().max() / b.abs().max().clamp(min=1e-30)).item() for a, b in pairs]
    return max(worst, default=0.0)


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors of an output in the order of their names."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping):
        for name in sorted(output):
            yield output[name]


def memory(candidate: Candidate, calls: int, device: str) -> dict[str, int]:
    """Bytes at the peak of the first calls and before them. To be called once, in a fresh process, with one candidate.

    CPU: resident memory of the process, what building the work has left behind given back. GPU: what torch has allocated on it.
    """
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        give_back()
        before = process_memory("VmRSS")
    for _ in range(calls):
        candidate.run()
    peak = torch.cuda.max_memory_allocated() if device == "cuda" else process_memory("VmHWM")
    return {"peak": peak, "before": before, "working": max(0, peak - before)}
