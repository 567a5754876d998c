"""The log of a run: log.jsonl and TensorBoard."""

from __future__ import annotations

import json
import math
from pathlib import Path

from pamm.files import replace_text


class Log:
    """Appends to log.jsonl and TensorBoard in a run folder; lines after `step`, where the run resumes, are dropped."""

    def __init__(self, out: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        path = out / "log.jsonl"
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
        replace_text(path, "".join(line + "\n" for line in lines if _step_of(line) <= step and step))
        self.file = path.open("a", encoding="utf-8")
        self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, kind: str, values: dict[str, float]) -> None:
        """One line and the same numbers to TensorBoard; numbers that are not finite are left out."""
        finite = {key: value for key, value in values.items() if math.isfinite(value)}
        self.file.write(json.dumps({"step": step, "kind": kind, **finite}) + "\n")
        self.file.flush()
        for key, value in finite.items():
            self.board.add_scalar(f"{kind}/{key}", value, step)

    def close(self) -> None:
        self.file.close()
        self.board.close()


def _step_of(line: str) -> float:
    """The step a line belongs to; infinity for a line that was cut off or is not one of ours."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf
    return step if isinstance(step, (int, float)) else math.inf
