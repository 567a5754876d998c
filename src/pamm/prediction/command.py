"""The command line of `pamm predict`."""

from __future__ import annotations

import argparse
from pathlib import Path

from pamm.command_line import add_device, add_kernels, add_precision, at_least, parser, say
from pamm.files import shown

FAILURES_SHOWN = 50
"""Images that could not be predicted, each named on a line of its own."""


def main(arguments: list[str]) -> int:
    """Run `pamm predict ARGUMENTS`. Returns 1 where an image has no maps. Raises PredictError, CheckpointError, ConfigError."""
    args = arguments_parser().parse_args(arguments)
    from pamm.prediction import Predictor, check_formats, check_output, list_inputs, predict_files

    formats = tuple(dict.fromkeys(part for part in map(str.strip, args.formats.split(",")) if part))
    check_formats(formats)
    inputs = list_inputs(args.inputs)
    paths = inputs.images
    check_output(args.out, paths, formats, sheet=not args.no_sheet)
    settings = {"longest_side": args.longest_side, "precision": args.precision, "compile": args.compile}
    settings["kernels"] = args.kernels
    predictor = Predictor(args.source, device=args.device, **settings)
    files = {"formats": formats, "sheet": not args.no_sheet, "skip_existing": args.skip_existing}
    summary = predict_files(predictor, paths, args.out, **files)
    skipped = f", {len(summary.skipped)} were there already" if summary.skipped else ""
    total = len(paths) + len(inputs.unread)
    print(f"{len(summary.done)} of {total} images predicted into {shown(args.out, 300)}{skipped}")
    failed = [*summary.failed, *inputs.failures()]
    for path, reason in failed[:FAILURES_SHOWN]:
        say(f"  failed: {shown(path, 300)}: {shown(reason, 500)}")
    if failed[FAILURES_SHOWN:]:
        say(f"  and {len(failed) - FAILURES_SHOWN} more failed")
    for note in inputs.notes():
        print(f"  {note}")
    if summary.stopped:
        say(f"pamm: stopped: {summary.stopped}; then go on with --skip-existing")
    return 1 if failed or summary.stopped else 0


def arguments_parser() -> argparse.ArgumentParser:
    own = parser("predict")
    own.add_argument("source", help="run folder, saved model folder or hub repository")
    own.add_argument("inputs", nargs="+", help="images, folders of images or globs")
    own.add_argument("--out", type=Path, default=Path("predictions"))
    own.add_argument("--formats", default="picture,png", help="any of picture,png,npy (default: picture,png)")
    own.add_argument("--skip-existing", action="store_true", help="pass over images whose files are there and whole")
    own.add_argument("--longest-side", type=at_least(1), help="shrink images to this longer side before the network")
    add_device(own)
    add_precision(own)
    own.add_argument("--compile", action="store_true", help="run the network through torch.compile")
    add_kernels(own)
    own.add_argument("--no-sheet", action="store_true", help="no contact sheet")
    return own
