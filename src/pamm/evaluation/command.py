"""The command line of `pamm eval`."""

from __future__ import annotations

import argparse
import dataclasses
import errno
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from pamm.command_line import add_device, add_kernels, add_precision, add_root, at_least, check_writable, parser
from pamm.files import shown

if TYPE_CHECKING:
    from pamm.evaluation.evaluate import Evaluation
    from pamm.evaluation.gain import Comparison
    from pamm.evaluation.scores import Resolution
    from pamm.tasks import Task


def main(arguments: list[str]) -> int:
    """Run `pamm eval ARGUMENTS`. Raises CheckpointError, ConfigError, DataError, GainError, and OSError for the outputs."""
    args = arguments_parser().parse_args(arguments)
    from pamm.config.experiment import TrainConfig
    from pamm.evaluation.evaluate import evaluate_saved
    from pamm.evaluation.gain import baseline_scores
    from pamm.evaluation.scores import RESOLUTIONS
    from pamm.runtime.distributed import is_first_process, launch

    if args.baseline:
        baseline_scores(args.baseline)  # an error now, not after hours of evaluating
    if is_first_process():
        check_outputs(args.out, args.report)
    named, tasks = evaluate_saved(
        args.source,
        launch(TrainConfig(device=args.device, devices=args.devices)),
        data=args.data,
        root=args.root,
        split=args.split,
        batch_size=args.batch,
        workers=args.workers,
        resolutions=RESOLUTIONS if args.resolution == "both" else (args.resolution,),
        ranked=args.pictures,
        pictures=args.report is not None,
        untrained=args.untrained,
        precision=args.precision,
        compile=args.compile,
        kernels=args.kernels,
    )
    if is_first_process():
        tell(args, named, tasks, command=f"pamm eval {shlex.join(arguments)}")
    return 0


def tell(
    args: argparse.Namespace, named: list[tuple[str, Evaluation]], tasks: dict[str, Task], *, command: str
) -> None:
    """Write, then print what was asked for. named: results by name, the model's last."""
    from pamm.evaluation.gain import GainError
    from pamm.evaluation.report import format_evaluation, write_evaluation_report

    name, result = named[-1]
    comparisons, incomparable = {}, None
    try:
        comparisons = compare_with(args.baseline, result) if args.baseline else {}
    except GainError as error:  # reported at the end, when the results are saved
        incomparable = error
    if comparisons:
        gain = {resolution: comparison.summary() for resolution, comparison in comparisons.items()}
        result = dataclasses.replace(result, gain={"over": args.baseline} | gain)
    named = [*named[:-1], (name, result)]
    page = None
    if args.out:
        result.save(args.out)
    if args.report:
        page = write_evaluation_report(args.report, named, tasks, comparisons=comparisons, command=command)
    print(format_evaluation(named, tasks, comparisons))
    print(f"weights: {result.model['weights']} of {shown(args.source, 300)}")
    if page:
        print(f"report: {shown(page, 300)}")
    if incomparable:
        raise incomparable


def arguments_parser() -> argparse.ArgumentParser:
    own = parser("eval")
    own.add_argument("source", help="run folder, saved model folder or hub repository")
    own.add_argument("--data", help="recipe or experiment.yaml whose data are measured (default: the run's own)")
    add_root(own)
    own.add_argument("--split", default="val")
    own.add_argument(
        "--resolution",
        default="both",
        choices=["frame", "original", "both"],
        help="where maps are compared: in the padded frame, as the papers do, or at every image's own size; costs no time "
        "where the frame shrinks no image",
    )
    own.add_argument("--batch", type=at_least(1), default=8, help="images per batch; does not change the result")
    add_device(own, several=True)
    own.add_argument("--workers", type=at_least(0), default=2, help="data loading processes")
    add_precision(own)
    own.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    add_kernels(own)
    own.add_argument("--baseline", help="also the gain over a named baseline, or over a JSON file of results")
    own.add_argument("--untrained", action="store_true", help="also the row of the same network with random weights")
    own.add_argument("--out", type=Path, help="write the results to this JSON file")
    own.add_argument("--report", type=Path, help="write results.json, results.md and report.html into this folder")
    own.add_argument(
        "--pictures",
        type=at_least(0),
        default=4,
        help="how many best and how many worst images of each task to name, and to show in the report (default 4)",
    )
    return own


def check_outputs(out: Path | None, report: Path | None) -> None:
    """Check that the results can be written, before any evaluation. Raises OSError."""
    if out and out.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(out))
    for folder in ([out.parent] if out else []) + ([report] if report else []):
        check_writable(folder)


def compare_with(baseline: str, result: Evaluation) -> dict[Resolution, Comparison]:
    """The comparison at every resolution that both have; prints why another has none. Raises GainError where none has."""
    from pamm.evaluation.gain import Conditions, GainError, compare

    found, failures = {}, {}
    own = Conditions(result.data, result.split, result.boundaries)
    for resolution, row in result.rows.items():
        protocol = result.protocol_at(resolution)
        try:
            found[resolution] = compare(row, baseline, resolution, own=own, protocol=protocol)
        except GainError as error:
            failures[resolution] = error
    if not found:
        raise next(iter(failures.values()))
    for resolution, error in failures.items():
        print(f"no Δ at the resolution '{resolution}': {error}")
    return found
