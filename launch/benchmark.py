"""Measure on this machine: one JSON object per line on stdout.

python launch/benchmark.py head --classes 200000 --dim 512 --batch 256 --ranks 2 --against textbook
python launch/benchmark.py train --config configs/demo.yaml --ranks 2 --against plain
python launch/benchmark.py data FOLDER --workers 2 --against webdataset --against pil
python launch/benchmark.py checkpoint --classes 1000000 --dim 512 --ranks 2
python launch/benchmark.py judge FOLDER --images 200000 --dim 256 --distractors 1000000
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from launch._main import at_least, run
from trainer.errors import UserError

positive = at_least(1)


def main() -> None:
    """Start the ranks, or be one of them."""
    options = build_parser().parse_args()
    os.environ["OMP_NUM_THREADS"] = str(getattr(options, "threads", 1))  # numbers of ranks then compare
    if options.what == "data":
        measure_reading(options)
    elif options.what == "judge":
        judge(options)
    elif "RANK" not in os.environ and options.ranks > 1:
        start_ranks(options.ranks)
    else:
        measures = {"head": measure, "train": measure_steps, "checkpoint": measure_checkpoint}
        measures[options.what](options)


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="benchmark.py"
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    head = commands.add_parser("head", help="steps of the class-parallel head on synthetic features")
    head.add_argument("--classes", type=at_least(2), required=True, metavar="K", help="over all ranks")
    head.add_argument("--dim", type=positive, default=512, metavar="D", help="width of the embedding")
    head.add_argument("--batch", type=positive, default=256, metavar="B", help="images over all ranks")
    head.add_argument("--ranks", type=positive, default=1, metavar="R", help="processes, one thread each")
    head.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="rows and products")
    head.add_argument("--update", choices=("fused", "autograd"), default="fused", help="head.update")
    head.add_argument("--against", choices=("textbook",), help="time the usual way too, in turn")
    head.add_argument("--steps", type=positive, default=5, metavar="N", help="rounds; the median is reported")
    head.add_argument("--tile-rows", type=positive, metavar="T", help="classes of a tile (default: chosen)")
    head.add_argument("--cache-mib", type=at_least(0), metavar="M", help="head.cache_mib (default: its own)")
    head.add_argument("--json", action="store_true", help="for symmetry: the output is always JSON")
    add_train_command(commands)
    add_data_command(commands)
    save = commands.add_parser("checkpoint", help="pause of a save, blocking and asynchronous; and a load")
    save.add_argument("--classes", type=positive, required=True, metavar="K", help="over all ranks")
    save.add_argument("--dim", type=positive, default=512, metavar="D", help="width of the embedding")
    save.add_argument("--ranks", type=positive, default=1, metavar="R", help="processes, one thread each")
    save.add_argument("--rounds", type=positive, default=3, metavar="N", help="saves of each kind; medians")
    save.add_argument("--folder", type=Path, default=Path("."), metavar="DIR", help="on the disk to measure")
    save.add_argument("--json", action="store_true", help="for symmetry: the output is always JSON")
    add_judge_command(commands)
    return parser


def add_train_command(commands: Any) -> None:
    """Add ``train`` to the commands."""
    training = commands.add_parser("train", help="whole steps of a recipe, reading included")
    training.add_argument("overrides", nargs="*", metavar="section.field=value", help="one field each")
    training.add_argument("--config", type=Path, metavar="FILE", help="YAML file with sections and fields")
    training.add_argument("--ranks", type=positive, default=1, metavar="R", help="processes")
    training.add_argument("--threads", type=positive, default=1, metavar="T", help="of each, on CPU")
    training.add_argument("--steps", type=positive, default=10, metavar="N", help="the median is reported")
    training.add_argument("--against", choices=("plain",), help="time a plain torch loop too, in turn")
    training.add_argument("--local_rank", help=argparse.SUPPRESS)  # DeepSpeed's launcher passes it
    training.add_argument("--json", action="store_true", help="for symmetry: the output is always JSON")


def add_judge_command(commands: Any) -> None:
    """Add ``judge`` to the commands."""
    judging = commands.add_parser("judge", help="all pairs of a set, and a search among distractors")
    judging.add_argument("folder", type=Path, metavar="FOLDER", help="for synthetic embeddings; they stay")
    judging.add_argument("--images", type=positive, required=True, metavar="N", help="all pairs are compared")
    judging.add_argument("--per-class", type=positive, default=20, metavar="N", help="images of a class")
    judging.add_argument("--dim", type=positive, default=256, metavar="D", help="width of the embedding")
    judging.add_argument("--probes", type=positive, default=3530, metavar="P", help="as MegaFace has them")
    judging.add_argument("--distractors", type=at_least(0), default=0, metavar="N", help="0: no search")
    judging.add_argument("--rounds", type=positive, default=5, metavar="N", help="in turn with bare products")
    judging.add_argument("--json", action="store_true", help="for symmetry: the output is always JSON")


def add_data_command(commands: Any) -> None:
    """Add ``data`` to the commands."""
    data = commands.add_parser("data", help="reading, decoding and batching of a packed data set")
    data.add_argument("folder", type=Path, metavar="FOLDER", help="data shards with an index")
    data.add_argument("--workers", type=positive, default=2, metavar="N", help="processes of the loader")
    data.add_argument(
        "--against",
        action="append",
        choices=("pil", "webdataset"),
        default=[],
        help="time the usual way too, in turn: ImageFolder or webdataset, both with PIL; may be repeated",
    )
    data.add_argument("--batch", type=positive, default=128, metavar="B", help="images of a batch")
    data.add_argument("--image-size", type=positive, default=112, metavar="PIXELS", help="side of the input")
    data.add_argument("--images", type=positive, default=5000, metavar="N", help="at most, in every round")
    data.add_argument("--rounds", type=positive, default=5, metavar="N", help="the median is reported")
    data.add_argument("--json", action="store_true", help="for symmetry: the output is always JSON")


def measure(options: argparse.Namespace) -> None:
    """Be one rank of the measurement; rank 0 prints. Raises UserError."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if options.ranks > 1 else "")
    from trainer.benchmark import HeadCase, measure_head
    from trainer.distributed import joined_world

    size = int(os.environ.get("WORLD_SIZE", "1"))
    if options.batch % size:
        raise UserError(f"--batch: {options.batch} is not divisible by {size} ranks")
    if options.classes < size:
        raise UserError(f"--classes: {options.classes} classes cannot be cut over {size} ranks")
    case = HeadCase(
        classes=options.classes,
        dim=options.dim,
        batch=options.batch,
        dtype=options.dtype,
        update=options.update,
        against=options.against,
        steps=options.steps,
        tile_rows=options.tile_rows,
        cache_mib=options.cache_mib,
    )
    with joined_world(timeout_seconds=1800.0) as world:
        result = measure_head(case, world)
        if world.is_main:
            print(json.dumps(result), flush=True)


def measure_steps(options: argparse.Namespace) -> None:
    """Be one rank of the measurement; rank 0 prints. Raises UserError."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu" if options.ranks > 1 else "")
    from trainer.options import load

    config = load(options.config, options.overrides)

    from trainer.benchmark_train import TrainCase, measure_training
    from trainer.distributed import joined_world

    case = TrainCase(config=config, steps=options.steps, against=options.against)
    with joined_world(config.engine.timeout_seconds) as world:
        result = measure_training(case, world)
        if world.is_main:
            print(json.dumps(result), flush=True)


def measure_reading(options: argparse.Namespace) -> None:
    """Print the figures of every stage. Raises UserError."""
    from trainer.databench import DataCase, measure_data

    case = DataCase(
        folder=options.folder,
        workers=options.workers,
        against=tuple(options.against),
        batch=options.batch,
        image_size=options.image_size,
        images=options.images,
        rounds=options.rounds,
    )
    for figures in measure_data(case):
        print(json.dumps(figures), flush=True)


def judge(options: argparse.Namespace) -> None:
    """Print the figures. Raises UserError."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    from trainer.benchmark_judge import JudgeCase, measure_judging

    case = JudgeCase(
        folder=options.folder,
        images=options.images,
        per_class=options.per_class,
        dim=options.dim,
        probes=options.probes,
        distractors=options.distractors,
        rounds=options.rounds,
    )
    print(json.dumps(measure_judging(case)), flush=True)


def measure_checkpoint(options: argparse.Namespace) -> None:
    """Be one rank of the measurement, on CPU; rank 0 prints. Raises UserError."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import shutil
    import tempfile

    from trainer.benchmark_save import SaveCase, measure_saving
    from trainer.collectives import from_main
    from trainer.distributed import joined_world

    if not options.folder.is_dir():
        raise UserError(f"--folder: {options.folder} is not a folder")
    with joined_world(timeout_seconds=1800.0) as world:
        made = tempfile.mkdtemp(dir=options.folder, prefix="checkpoint-") if world.is_main else ""
        folder = Path(from_main(made, world.group))
        case = SaveCase(
            classes=options.classes, dim=options.dim, rounds=options.rounds, folder=folder / "checkpoints"
        )
        try:
            result = measure_saving(case, world)
        finally:
            if world.is_main:
                shutil.rmtree(folder)
        if world.is_main:
            print(json.dumps(result), flush=True)


def start_ranks(num_ranks: int) -> None:
    """Run this command once per rank and end with the first exit code that is not 0."""
    from trainer.distributed import open_meeting

    _store, environments = open_meeting(num_ranks)
    ranks = [
        subprocess.Popen([sys.executable, *sys.argv], env=os.environ | environment)
        for environment in environments
    ]
    try:
        codes = [rank.wait() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    if any(codes):
        code = next(code for code in codes if code)
        sys.exit(code if code > 0 else 128 - code)  # ended by a signal: as a shell says it


if __name__ == "__main__":
    run(main)
