"""Write the report of a run: ``python launch/report.py runs/NAME [section.field=value ...]``.

Judges the newest checkpoint on the run's test sets and writes ``runs/NAME/report.html``, one file that needs
no network. Training does the same at its end.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/report.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run


def main() -> None:
    """Read the command line, write the report, say where it is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="report.py"
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="other settings for it")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    options = parser.parse_intermixed_args()

    from trainer.log import configure_logging
    from trainer.report import report  # imports torch: only once the command line is right

    configure_logging(None, int(os.environ.get("RANK", "0")))
    path = report(options.run, options.overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps({"report": str(path)}) if options.json else path)


if __name__ == "__main__":
    run(main)
