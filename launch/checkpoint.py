"""Look at checkpoints: what one is, whether it is whole, and its head for use elsewhere.

python launch/checkpoint.py show CHECKPOINT
python launch/checkpoint.py verify CHECKPOINT
python launch/checkpoint.py export-head CHECKPOINT OUT.safetensors

CHECKPOINT may be a run: its newest. Rows are streamed, so a head of any size needs little memory.
"""

import argparse
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, do what it says, print the result."""
    options = build_parser().parse_args()
    from trainer.errors import UserError
    from trainer.export import write_centroids  # imports torch: only once the command line is right
    from trainer.trained import describe, open_trained, verify

    trained = open_trained(options.checkpoint)
    if options.command == "show":
        found = describe(trained)
    elif options.command == "verify":
        found = {"checkpoint": str(trained.path), "whole": True, "numbers": verify(trained)}
    else:
        if options.out.exists():
            raise UserError(f"OUT: {options.out} exists already")
        write_centroids(trained, options.out)
        found = {"out": str(options.out), "classes": trained.num_classes}
    print(json.dumps(found) if options.json else "\n".join(f"{k:<17} {v}" for k, v in found.items()))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="checkpoint.py"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, text in (
        ("show", "step, model, classes, files"),
        ("verify", "hash every file, read every number"),
        ("export-head", "unit centroids as one safetensors file"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint or run")
        if name == "export-head":
            command.add_argument("out", type=Path, metavar="OUT", help="file to write")
        command.add_argument("--json", action="store_true", help="one JSON object on stdout")
    return parser


if __name__ == "__main__":
    run(main)
