"""The process that measures one case: a job as JSON on standard input, events as JSON lines on standard output.

A job is {"work": name in WORKS, "mode": "time" | "memory", "settings": {...}, "rounds", "budget", "longest", "threads",
"skip": [...], "only": name}. Events are {"begin": candidate}, then {"result": {...}} or {"failed": message}.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

WORKS = {
    "scan": "speed.scan",
    "layers": "speed.layers",
    "model": "speed.model",
    "train": "speed.train",
    "scaling": "speed.scaling",
}
"""Kind of work → the module whose `workload(settings, only)` makes it."""


def main() -> None:
    """Run the job; a failure that the package's own errors tell becomes an event, others a traceback."""
    events = sys.stdout
    sys.stdout = sys.stderr
    job = json.loads(sys.stdin.read())

    def tell(**event: Any) -> None:
        print(json.dumps(event), file=events, flush=True)

    try:
        tell(result=run(job, lambda name: tell(begin=name)))
    except Exception as error:
        if not type(error).__module__.startswith("pamm."):
            raise
        tell(failed=str(error))


def run(job: dict[str, Any], begin: Any) -> dict[str, Any]:
    """Do the job: candidate → what was measured of it, with the facts of the work."""
    import torch

    from pamm.runtime.memory import keep_memory
    from speed.measure import Workload, in_turn, memory

    settings, device = job["settings"], job["settings"]["device"]
    if job.get("threads"):
        torch.set_num_threads(job["threads"])
    torch.manual_seed(0)
    if device == "cpu":
        if settings["allocator"] == "keep":
            keep_memory()
        limit_memory()
    work: Workload = importlib.import_module(WORKS[job["work"]]).workload(settings, job.get("only"))
    facts = {"shape": dict(work.shape), "images": work.images, "threads": torch.get_num_threads()}
    if job["mode"] == "memory":
        begin(job["only"])
        return facts | {"memory": memory(work.candidates[job["only"]], work.memory_calls, device)}
    kept = {name: candidate for name, candidate in work.candidates.items() if name not in job.get("skip", ())}
    if job.get("inline_memory"):
        facts["memory"] = memory(next(iter(kept.values())), work.memory_calls, device)
    chosen = Workload(kept, work.shape, work.images, work.steps, work.memory_calls, work.floor)
    timings = in_turn(
        chosen, rounds=job["rounds"], budget=job["budget"], longest=job["longest"], device=device, begin=begin
    )
    facts |= {"steps": work.steps, "limits": limits(work, settings)}
    measured = {
        name: {"seconds": t.summary(), "flops": t.flops, "difference": t.difference, "error": t.error}
        for name, t in timings.items()
    }
    return facts | {"candidates": measured}


def limits(work: Any, settings: dict[str, Any]) -> dict[str, Any]:
    """What the machine can do at most in this work's arithmetic, measured now."""
    from speed.machine import product_rates

    found = product_rates(settings["device"], settings["dtype"]) if work.images else {}
    return found | ({"floor": work.floor()} if work.floor else {})


def limit_memory() -> None:
    """Let an allocation beyond the machine's free memory fail in this process, instead of the system ending some other one.

    Should memory run out all the same, this process is the first that Linux ends. Does nothing on other systems.
    """
    from speed.machine import free_memory, process_memory

    free = free_memory()
    if free is None:
        return
    import resource

    with contextlib.suppress(OSError):
        Path("/proc/self/oom_score_adj").write_text("1000")
    allowed = int(0.92 * free) + process_memory("VmData")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard == resource.RLIM_INFINITY or allowed < hard:
        resource.setrlimit(resource.RLIMIT_DATA, (allowed, hard))


if __name__ == "__main__":
    main()
