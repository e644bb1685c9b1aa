"""Train a model: ``deepspeed launch/train.py --config FILE section.field=value ...``.

The same under torchrun or srun, or by plain ``python`` in one process.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/train.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run
from trainer.options import help_text, load


def main() -> None:
    """Read the command line, then train."""
    parser = argparse.ArgumentParser(
        description="Train a recognition model. Precedence: defaults < --config < section.field=value.",
        epilog="fields:\n" + help_text(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", type=Path, metavar="FILE", help="YAML file with sections and fields")
    parser.add_argument("overrides", nargs="*", metavar="section.field=value", help="one field each")
    parser.add_argument("--json", action="store_true", help="print the final test metrics as JSON on stdout")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    arguments = parser.parse_intermixed_args()  # overrides may stand on both sides of --config
    config = load(arguments.config, arguments.overrides)

    from trainer.log import configure_logging  # torch is imported only once the configuration is right
    from trainer.loop import train

    rank = int(os.environ.get("RANK", "0"))
    configure_logging(config.run_folder, rank)
    metrics = train(config)
    if arguments.json and rank == 0:
        print(json.dumps({"run": str(config.run_folder), **metrics}))


if __name__ == "__main__":
    run(main)
