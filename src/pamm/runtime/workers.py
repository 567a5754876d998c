"""Worker processes: they leave signals to the process that started them, end with it, and their death is reported in one line."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from concurrent.futures.process import BrokenProcessPool

from pamm import PammError


def serve_parent(*_: object) -> None:
    """Call first in a worker process, which `multiprocessing` started.

    A Ctrl-C, which the whole process group receives, is the parent's to answer. SIGTERM ends the worker (a forked one has the
    parent's handler): so a pool of which one worker died gets rid of the others. Where the parent ends without a word, by
    SIGKILL, the worker ends too.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    if parent is not None:
        threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def serve_training(*_: object) -> None:
    """As `serve_parent`, and a SIGTERM to the whole process group is the parent's too: it saves, then ends its workers itself."""
    serve_parent()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


class WorkerError(PammError, RuntimeError):
    """A worker process ended before its work was done; the message holds the remedy."""


def data_worker_ended(reason: str) -> str:
    """The remedy for a data loading process that ended, in one line."""
    return (
        f"a data loading process ended before its work was done ({reason}): most likely the memory or the shared memory "
        "(/dev/shm) is full. Load with fewer processes or none (--train.workers 0; of pamm eval: --workers 0), or give it "
        "more: in a container, docker run --shm-size=8g"
    )


def exhausted(error: BaseException) -> str | None:
    """The remedy for an error by which a worker process died or memory was used up; None for other errors."""
    if isinstance(error, WorkerError):
        return str(error)
    if type(error).__module__.startswith("pamm."):
        return None
    text = str(error)
    first = (text.strip() or type(error).__name__).splitlines()[0]
    if isinstance(error, RuntimeError) and text.startswith(("DataLoader worker", "Pin memory thread")):
        return data_worker_ended(first)
    if isinstance(error, BrokenProcessPool):
        return (
            "a worker process ended before its image was done, most likely for want of memory. Leave it more memory, or run "
            "on fewer cores, one worker each (taskset --cpu-list 0 pamm …)"
        )
    if isinstance(error, RuntimeError) and ("unable to mmap" in text or "unable to open shared memory" in text):
        return data_worker_ended(first)
    if _out_of_memory(error, text):
        return (
            f"the memory does not suffice ({first}). Use smaller batches (--train.batch, or more parts of one: "
            "--train.accumulate), --train.grad_checkpointing True, fewer data loading processes (--train.workers; of pamm eval: "
            "--batch 1 --workers 0), or smaller images (--data.size; of pamm predict: --longest-side)"
        )
    return None


def _out_of_memory(error: BaseException, text: str) -> bool:
    names = {kind.__name__ for kind in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in names:
        return True
    told = ("can't allocate memory", "not enough memory", "out of memory", "Cannot allocate memory")
    return isinstance(error, (RuntimeError, OSError)) and any(part in text for part in told)
