"""The command line of `pamm import`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pamm.command_line import parser


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
    plain = own.parse_args(arguments)
    from pamm.official import OfficialError, load
    from pamm.training.checkpoint import save_checkpoint

    if plain.out.exists() and (plain.out.is_file() or any(plain.out.iterdir())):
        raise OfficialError(f"{plain.out} exists already; choose another folder, or remove it")
    sizes: dict[str, Any] = {"image_size": plain.image_size, "checkpoint_size": plain.checkpoint_size}
    sizes = {name: tuple(size) for name, size in sizes.items() if size}
    model = load(plain.checkpoint, num_heads=plain.num_heads, scan=plain.scan, **sizes)
    save_checkpoint(plain.out, model)
    print(f"{model.load_report}\nmodel folder: {plain.out}")
    return 0
