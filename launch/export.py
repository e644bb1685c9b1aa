"""Export a trained model for use elsewhere: ``python launch/export.py runs/NAME [--format timm onnx ...]``.

Writes the backbone in each format (checked against the model on real images), the merged centroids with the
names of the classes, and a model card.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, export, say what was written."""
    options = build_parser().parse_args()
    from trainer.export import export  # imports torch: only once the command line is right

    result = export(
        options.run,
        options.out,
        formats=list(dict.fromkeys(options.format)),
        input_type=options.input,
        images=options.images,
        overwrite=options.overwrite,
    )
    if options.json:
        print(json.dumps({"out": str(result.folder), "differences": result.differences}))
    else:
        checked = ", ".join(f"{name} (differs by {value:.1e})" for name, value in result.differences.items())
        print(f"{result.folder}: {checked}, centroids, model card")


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="export.py"
    )
    add = parser.add_argument
    add("run", type=Path, metavar="RUN", help="folder of a run (its newest checkpoint), or a checkpoint")
    add("--out", type=Path, metavar="DIR", help="folder to write (default: RUN/export)")
    add(
        "--format",
        nargs="+",
        choices=("timm", "onnx", "torch", "torchscript"),
        default=["timm"],
        help="default: timm",
    )
    add("--input", choices=("uint8", "float32"), default="uint8", help="type of the pixels, not for timm")
    add("--images", type=Path, metavar="DATA", help="packed data set to check on (default: the run's own)")
    add("--overwrite", action="store_true", help="replace DIR")
    add("--json", action="store_true", help="one JSON object on stdout")
    return parser


if __name__ == "__main__":
    run(main)
