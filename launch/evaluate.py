"""Judge trained runs on their test sets: ``python launch/evaluate.py runs/NAME [runs/OTHER ...]``.

Prints a table (or JSON), and draws ``figures/*.png`` into the first run's folder. The same under
``deepspeed`` or ``torchrun``: all ranks embed, and the numbers are the same on any number of them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/evaluate.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, evaluate, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN|section.field=value",
        help="folders of runs, and changes to their configuration",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per run on stdout")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    arguments = parser.parse_intermixed_args()
    folders = [Path(text) for text in arguments.runs if "=" not in text]
    overrides = [text for text in arguments.runs if "=" in text]
    if not folders:
        parser.error("name at least one run folder")

    from trainer.compare import compare, table  # imports torch: only once the command line is right
    from trainer.log import configure_logging

    configure_logging(None, int(os.environ.get("RANK", "0")))
    metrics = compare(folders, overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        if arguments.json:
            for path, values in metrics.items():
                print(json.dumps({"run": path, **values}))
        else:
            print(table(metrics))


if __name__ == "__main__":
    run(main)
