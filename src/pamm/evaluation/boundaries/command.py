"""The command line of `pamm boundary`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from pamm.command_line import at_least, parser
from pamm.evaluation.boundaries import BoundaryError
from pamm.evaluation.boundaries.measure import BoundaryScores, measure_folders
from pamm.files import replace_text, shown
from pamm.tasks.boundary import PROTOCOLS
from pamm.tasks.metrics.images import processes

SHOWN = 10
"""Images listed unless all are asked for."""


def main(arguments: list[str]) -> int:
    """Run `pamm boundary ARGUMENTS`. Raises BoundaryError, DataError, LabelError, OSError."""
    args = arguments_parser().parse_args(arguments)
    if args.out and args.out.is_dir():
        raise BoundaryError(f"--out: {args.out} is a folder, expected the path of a JSON file")
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
    scores = measure_folders(
        args.predictions,
        args.truths,
        protocol=args.protocol,
        max_distance=args.max_distance,
        ids=args.ids,
        outline=args.outline,
        suppressed=args.suppressed,
        invert_maps=args.invert_maps,
        invert_truths=args.invert_truths,
        workers=args.workers or processes(),
        progress=sys.stderr.isatty(),
    )
    if args.out:
        replace_text(args.out, json.dumps(scores.to_json()) + "\n")
    print(format_scores(scores, every=args.all))
    if args.out:
        print(f"counts at every threshold: {shown(args.out, 300)}")
    return 0


def arguments_parser() -> argparse.ArgumentParser:
    own = parser("boundary")
    own.add_argument("predictions", type=Path, help="folder of maps: PNG of 8 or 16 bits, or .npy in [0, 1]")
    own.add_argument(
        "truths",
        type=Path,
        help="folder of truths of the same names: BSDS .mat, PNG or .npy of lines (or labels: --outline)",
    )
    own.add_argument("--protocol", choices=list(PROTOCOLS), default="bdet", help="not comparable with one another")
    own.add_argument(
        "--max-distance", type=float, default=0.0075, help="fraction of the diagonal (default: 0.0075; NYUD-v2: 0.011)"
    )
    own.add_argument("--ids", type=Path, help="measure only the names in this list, one per line")
    own.add_argument(
        "--outline",
        action="store_true",
        help="truths are outlines of regions of equal values: label maps, and NYUD-v2's boundary pictures under bdet",
    )
    own.add_argument("--suppressed", action="store_true", help="the maps went through non-maximum suppression already")
    own.add_argument("--invert-maps", action="store_true", help="boundaries are dark on light in the maps")
    own.add_argument("--invert-truths", action="store_true", help="lines are dark on light in the truths")
    own.add_argument(
        "--workers", type=at_least(1), help="processes (default: one per core); does not change the result"
    )
    own.add_argument("--all", action="store_true", help=f"list every image, not only the {SHOWN} worst")
    own.add_argument("--out", type=Path, help="write scores and all counts to this JSON file")
    return own


def format_scores(scores: BoundaryScores, *, every: bool = False) -> str:
    """The scores as text, with each image's best F: of all images, or of the worst."""
    found = scores.scores()
    lines = [
        *scores.notes(),
        f"{len(scores.counts)} images, protocol {scores.protocol}, distance {scores.max_distance:g} of the diagonal",
    ]
    for name in ("ODS", "OIS"):
        at = f"threshold {found[name]['threshold']:g}" if name == "ODS" else "each image at its own threshold"
        lines.append(
            f"{name} {found[name]['F']:.4f}  recall {found[name]['recall']:.4f}  precision {found[name]['precision']:.4f}  {at}"
        )
    lines.append(f"AP  {found['AP']:.4f}")
    images = {shown(name): row for name, row in scores.images().items()}
    names = list(images) if every else sorted(images, key=lambda name: images[name]["F"])[:SHOWN]
    width = max(len(name) for name in ["image", *names])
    lines.append(f"\n{'image':<{width}}       F  recall  precision  threshold{'' if every else '   (the worst)'}")
    for name in names:
        row = images[name]
        lines.append(
            f"{name:<{width}}  {row['F']:.4f}  {row['recall']:.4f}     {row['precision']:.4f}     {row['threshold']:g}"
        )
    return "\n".join(lines)
