"""The log of a run: log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path


class Log:
    """Appends to log.jsonl and TensorBoard in a run folder; lines after `step`, where the run resumes, are dropped."""

    def __init__(self, out: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = out / "log.jsonl"
        kept = []
        if path.exists():
            kept = [line for line in path.read_text().splitlines() if _step_of(line) <= step]
        path.write_text("".join(line + "\n" for line in kept if step))
        self.file = path.open("a")
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1 if step else None)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line and the same numbers to TensorBoard."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self.file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self.file.flush()
        for key, value in finite.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):  # a line cut off by a kill
        return math.inf
