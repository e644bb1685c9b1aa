"""Examine every host of a run before it starts: same code, config and data, healthy, well connected?

deepspeed --hostfile hostfile launch/preflight.py --config configs/demo.yaml     (arguments as of train.py)
"""

import argparse
import json
import os
import socket
import sys
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from launch._main import run
from trainer.options import load


def main() -> int:
    """Read the command line, look, and return the exit code: 1 when something is off."""
    options = build_parser().parse_intermixed_args()
    config = load(options.config, options.overrides)

    from trainer.distributed import LostRankError, joined_world  # torch: only once the command line is right
    from trainer.preflight import Limits, preflight, require_address, table

    limits = Limits(
        clock_seconds=options.clock_seconds,
        disk_gib=options.disk_gib,
        slowest=options.slowest,
        megabytes_per_second=options.megabytes_per_second,
        latency_seconds=options.latency_seconds,
    )
    sys.stderr.write(f"rank {os.environ.get('RANK', '0')} is on {socket.gethostname()}\n")
    require_address()
    try:
        with joined_world(options.timeout_seconds) as world:
            report = preflight(config, world, limits)
    except LostRankError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    if world.is_main:
        print(json.dumps(asdict(report)) if options.json else table(report), flush=True)
    return 1 if report.problems else 0


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="preflight.py"
    )
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="the run's YAML file")
    add("overrides", nargs="*", metavar="section.field=value", help="the run's fields")
    add("--json", action="store_true", help="one JSON object: ranks, link, problems")
    add("--timeout-seconds", type=float, default=30.0, help="wait so long for a host (default: 30)")
    add("--clock-seconds", type=float, default=1.0, help="clocks may differ so much (default: 1)")
    add("--disk-gib", type=float, default=10.0, help="free space for the run folder (default: 10)")
    add("--slowest", type=float, default=0.6, help="a rank's GEMM against the median (default: 0.6)")
    add("--megabytes-per-second", type=float, default=0.0, help="least bus bandwidth (default: any)")
    add("--latency-seconds", type=float, default=0.1, help="longest small all-reduce (default: 0.1)")
    add("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    return parser


if __name__ == "__main__":
    run(main)
