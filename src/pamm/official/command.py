"""The command line of `pamm import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pamm.command_line import parser
from pamm.files import shown


def main(arguments: list[str]) -> int:
    own = parser("import")
    own.add_argument("checkpoint", type=Path, help="file of torch.save or .safetensors; nothing in it is executed")
    own.add_argument(
        "--out", type=Path, required=True, help="new folder for the weights (safetensors) and the settings"
    )
    own.add_argument("--image-size", type=int, nargs=2, metavar=("H", "W"), help="pixels (default: the checkpoint's)")
    own.add_argument("--checkpoint-size", type=int, nargs=2, metavar=("H", "W"), help="pixels it was trained at")
    own.add_argument("--num-heads", type=int, help="attention heads of a vision transformer (default: width / 64)")
    own.add_argument(
        "--scan",
        choices=["hilbert", "snake", "morton", "h", "s", "z"],
        help="scan orders of a PAMM, by our or the published name, which its checkpoint does not show (default: hilbert)",
    )
    own.add_argument(
        "--facts",
        nargs="+",
        metavar="KEY=VALUE",
        default=[],
        help="what neither keys nor shapes tell of an InvPT, a TaskPrompter or an MLoRE, e.g. topk=9 pre_softmax=true",
    )
    own.add_argument(
        "--published",
        choices=["nyud", "pascal", "cityscapes"],
        help="take these facts from the published configuration for this data set",
    )
    args = own.parse_args(arguments)
    from pamm.official import OfficialError, load
    from pamm.training.checkpoint import save_checkpoint

    if args.out.exists() and (args.out.is_file() or any(args.out.iterdir())):
        raise OfficialError(f"{args.out} exists already; choose another folder, or remove it")
    sizes: dict[str, Any] = {"image_size": args.image_size, "checkpoint_size": args.checkpoint_size}
    sizes = {name: tuple(size) for name, size in sizes.items() if size}
    facts = {"facts": _facts(args.facts), "published": args.published}
    model = load(args.checkpoint, num_heads=args.num_heads, scan=args.scan, **sizes, **facts)
    save_checkpoint(args.out, model)
    print(f"{model.load_report}\nmodel folder: {args.out}")
    return 0


def _facts(pairs: list[str]) -> dict[str, Any]:
    """["topk=9", "ranks=[3, 4]"] → {"topk": 9, "ranks": [3, 4]}. Raises ConfigError."""
    import yaml

    from pamm.config.strict import ConfigError

    facts = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        try:
            facts[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            equals = ""
        if not equals or not value or not key:
            raise ConfigError(f"--facts: found '{shown(pair)}', expected KEY=VALUE, e.g. topk=9 or pre_softmax=true")
    return facts
