"""Change the classes of a checkpoint to those of other data, and train on.

python launch/classes.py grow  CHECKPOINT NEW_DATA --out runs/NEW      every old class is there, and new ones
python launch/classes.py drop  CHECKPOINT NEW_DATA --out runs/NEW      some old classes are gone
python launch/classes.py merge CHECKPOINT NEW_DATA --out runs/NEW --map FILE     {"old name": "new name", ...}
python launch/classes.py remap CHECKPOINT NEW_DATA --out runs/NEW      all of it

Classes are matched by name. runs/NEW is a run that goes on at the same step:
deepspeed launch/train.py --config runs/NEW/config.yaml optim.steps=...
Works under deepspeed or torchrun too: no rank holds more than its rows.
"""

import argparse
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run
from trainer.errors import UserError


def main() -> None:
    """Read the command line, write the new checkpoint, say what changed."""
    options = build_parser().parse_args()
    renames = read_map(options.map) if options.map else {}
    from trainer.classes import change_classes  # imports torch: only once the command line is right

    found = change_classes(
        options.command,
        options.checkpoint,
        options.data,
        options.out,
        renames=renames,
        new_rows=options.new,
    )
    if int(os.environ.get("RANK", "0")) == 0:
        if options.json:
            print(json.dumps(found))
        else:
            print(
                "{checkpoint}: {classes} classes, {new} new, {dropped} dropped, {merged} merged".format(
                    **found
                )
            )


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="classes.py"
    )
    add = parser.add_argument
    add("command", choices=("grow", "drop", "merge", "remap"), help="what may change")
    add("checkpoint", type=Path, metavar="CHECKPOINT", help="checkpoint, or a run (its newest)")
    add("data", type=Path, metavar="NEW_DATA", help="packed data set with the new classes")
    add("--out", type=Path, required=True, metavar="RUN", help="run folder to write")
    add("--map", type=Path, metavar="FILE", help="JSON object: old name to new name")
    add(
        "--new",
        choices=("mean", "random"),
        default="mean",
        help="rows of new classes: mean feature (default)",
    )
    add("--json", action="store_true", help="one JSON object on stdout")
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


def read_map(path: Path) -> dict[str, str]:
    """Return the renames of a JSON file. Raises UserError."""
    try:
        renames = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"--map: {path}: cannot read: {error}") from None
    if not isinstance(renames, dict) or not all(isinstance(name, str) for name in renames.values()):
        raise UserError(f"--map: {path}: must hold one object of old name: new name")
    return renames


if __name__ == "__main__":
    run(main)
