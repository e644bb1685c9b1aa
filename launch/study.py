"""Run a study: ``python launch/study.py configs/studies/NAME.yaml [section.field=value ...]``.

Runs every row with every seed that is not finished, each as a process of its own, and writes
``runs/studies/NAME/table.md`` (and ``table.csv``, ``runs.csv``). Start it again to go on after any end.
"""

import argparse
import json
import logging
import shlex
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run
from trainer.errors import UserError


def main() -> None:
    """Read the command line, run what is missing, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", type=Path, metavar="FILE", help="YAML file: base, axes, seeds, metrics")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="for every row, last")
    parser.add_argument("--root", type=Path, default=Path("runs/studies"), help="folder of all studies")
    parser.add_argument("--parallel", type=int, default=1, help="runs at a time")
    parser.add_argument(
        "--only", action="append", metavar="PATTERN", help="runs by name, 'coco-*-seed0'; can be repeated"
    )
    parser.add_argument("--commands", action="store_true", help="print the commands and run nothing")
    parser.add_argument("--json", action="store_true", help="print one JSON object per row on stdout")
    arguments = parser.parse_intermixed_args()
    only = arguments.only or ["*"]
    if arguments.parallel < 1:
        parser.error("--parallel: at least 1")

    from trainer.study import command_of, load_study, results_of, run_study, runs_named, summary, write_table

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    study = load_study(arguments.study, arguments.root, arguments.overrides)
    if arguments.commands:
        for one in runs_named(study, only):
            print(shlex.join(command_of(study, one)))
        return
    failed = run_study(study, arguments.parallel, only=only)
    if arguments.json:
        for line in summary(study, results_of(study)):
            print(json.dumps(line))
    else:
        print(write_table(study).read_text())
    if failed:
        raise UserError(f"{len(failed)} runs failed; see {failed[0].folder / 'study.log'}")


if __name__ == "__main__":
    run(main)
