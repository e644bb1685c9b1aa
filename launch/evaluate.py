"""Judge trained models: on the test sets of their runs, or by a published protocol.

python launch/evaluate.py RUN [RUN ...] [section.field=value ...]     the runs' own test sets, side by side
python launch/evaluate.py RUN [RUN ...] --protocol NAME --data PATH   see the options below

RUN is the folder of a run or, for a protocol, one of its checkpoints, a folder that launch/export.py wrote,
or an ONNX file; none is needed if all data are embeddings that launch/embed.py wrote. Prints a table (or
JSON); the runs' own sets are drawn into the first run's figures/ as well. The same under ``deepspeed`` or
``torchrun``: all ranks embed, and the numbers are the same on any number of them.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# `deepspeed launch/evaluate.py` puts launch/, not the repository, on sys.path.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run
from trainer.config import ProtocolConfig
from trainer.options import fields, load_protocol


def main() -> None:
    """Read the command line, evaluate, print."""
    parser = build_parser()
    arguments = parser.parse_intermixed_args()
    folders = [Path(text) for text in arguments.runs if "=" not in text]
    overrides = [text for text in arguments.runs if "=" in text]
    given = {name: getattr(arguments, name) for name, *_ in fields(ProtocolConfig)}
    texts = {name: value for name, value in given.items() if value is not None}
    if texts and overrides:
        parser.error(f"{overrides[0]}: a protocol has no use for a run's configuration")
    if not texts and not folders:
        parser.error("name at least one run folder")
    protocol = load_protocol(texts) if texts else None

    from trainer.compare import compare, table, table_of_figures  # torch: only if the command is right
    from trainer.log import configure_logging
    from trainer.models import judge_models

    configure_logging(None, int(os.environ.get("RANK", "0")))
    metrics = judge_models(folders, protocol) if protocol else compare(folders, overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        if arguments.json:
            for path, values in metrics.items():
                print(json.dumps({"run": path, **values}))
        else:
            print(table_of_figures(metrics) if protocol else table(metrics))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line; the options of protocols are the fields of their configuration."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="evaluate.py"
    )
    parser.add_argument("runs", nargs="*", metavar="RUN|section.field=value", help="models, and changes")
    parser.add_argument("--json", action="store_true", help="print one JSON object per run on stdout")
    parser.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    group = parser.add_argument_group("protocols")
    for name, kind, default, meaning in fields(ProtocolConfig):
        options: dict = {"metavar": "VALUE"}
        if kind == "bool":
            options = {"action": "store_const", "const": "true"}
        elif kind.startswith(("tuple", "dict")):
            options["nargs"] = "+"
        help_text = f"{meaning} ({kind}; default {default})".replace("%", "%%")
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, help=help_text, **options)
    return parser


if __name__ == "__main__":
    run(main)
