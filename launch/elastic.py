"""Train on several hosts, and go on with those that are left when one is lost.

python launch/elastic.py --hostfile hostfile --max-restarts 3 --config configs/demo.yaml optim.lr=0.1
"""

import argparse
import functools
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import at_least, run
from trainer.errors import UserError
from trainer.options import load


def main() -> int:
    """Read the command line and supervise; return the exit code."""
    options = build_parser().parse_intermixed_args()
    config = load(options.config, options.overrides)
    if config.checkpoint.resume != "auto":
        raise UserError(f"checkpoint.resume: has to be auto to go on, got {config.checkpoint.resume!r}")

    from trainer.elastic import answering, dividing, read_hostfile, run_deepspeed, supervise
    from trainer.log import configure_logging

    configure_logging(None, rank=0)
    hosts = read_hostfile(options.hostfile)
    batch = config.data.batch_size // config.engine.accumulation_steps
    if not dividing(hosts[:1], batch):
        raise UserError(f"data.batch_size: {batch} images are not divisible by the slots of {hosts[0].name}")
    training = ["--config", str(options.config)] if options.config else []
    command = [str(Path(__file__).with_name("train.py")), *training, *options.overrides]
    deepspeed = Path(sys.executable).with_name("deepspeed")
    return supervise(
        functools.partial(run_deepspeed, deepspeed, config.run_folder, command=command),
        lambda: dividing(answering(hosts), batch),
        config.run_folder / "done.json",
        max_restarts=options.max_restarts,
        min_hosts=options.min_hosts,
        pause_seconds=options.pause_seconds,
    )


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="elastic.py"
    )
    add = parser.add_argument
    add("--hostfile", type=Path, required=True, metavar="FILE", help="`HOST slots=N` a line")
    add("--max-restarts", type=at_least(0), default=3, metavar="N", help="tries after the first (default: 3)")
    add("--min-hosts", type=at_least(1), default=1, metavar="N", help="fewer do not start (default: 1)")
    add("--pause-seconds", type=float, default=10.0, help="before every restart (default: 10)")
    add("--config", type=Path, metavar="FILE", help="the run's YAML file")
    add("overrides", nargs="*", metavar="section.field=value", help="the run's fields")
    return parser


if __name__ == "__main__":
    run(main)
