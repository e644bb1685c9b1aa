"""Is a packed data set what its index says, to the last pixel? Everything is read and nothing is believed."""

import csv
import io
import os
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError
from trainer.index import Index, Shard, load_index
from trainer.jobs import ONE_PROCESS, Jobs
from trainer.shards import PAIRS, class_statistics, fingerprint_of, sha256_of
from trainer.sources.files import read_text
from trainer.sources.pictures import flaw
from trainer.tars import scan_tar

SHOWN = 20  # problems of one shard that are told one by one
TOLD_EVERY = 64


class Report(NamedTuple):
    """What a check has found."""

    packed: Index
    problems: list[str]


class _Found(NamedTuple):
    """What is in one shard."""

    problems: list[str]
    keys: list[str]


def check(folder: Path, jobs: Jobs = ONE_PROCESS) -> Report:
    """Read a whole data set and list what is wrong with it, each in one line. ``jobs.told`` counts samples.

    Checked: size and SHA-256 of every shard, every header, every label, every image, keys, class statistics,
    fingerprint and pairs. Raises UserError if there is no index, or none that can be opened.
    """
    index = load_index(folder, "FOLDER")
    found = jobs.run(lambda number: _check_shard(index, number, jobs), len(index.shards))
    problems = [problem for shard in found for problem in shard.problems]
    known = {shard.name for shard in index.shards}
    problems += [f"{p.name}: not in the index" for p in sorted(folder.glob("*.tar")) if p.name not in known]
    labels_N = np.asarray(index.labels_N)
    if fingerprint_of(index.shards, labels_N) != index.fingerprint:
        problems.append("index.json: its fingerprint is not that of its shards and labels")
    if class_statistics(labels_N, index.num_classes) != index.class_statistics:
        problems.append("index.json: its class statistics are not those of its labels")
    keys = [key for shard in found for key in shard.keys]
    if len(set(keys)) < len(keys):
        problems.append(f"{len(keys) - len(set(keys))} keys occur twice")
    if (folder / PAIRS).exists():
        problems += _check_pairs(folder / PAIRS, set(keys))
    return Report(index, problems)


def _check_shard(index: Index, number: int, jobs: Jobs) -> _Found:
    shard: Shard = index.shards[number]
    path = index.folder / shard.name
    if not path.is_file():
        return _nothing(f"{shard.name}: missing")
    problems = []
    if (size := path.stat().st_size) != shard.bytes:
        problems.append(f"{shard.name}: {size} bytes, its index says {shard.bytes}")
    try:
        if sha256_of(path) != shard.sha256:
            problems.append(f"{shard.name}: its SHA-256 is not that of its index")
        samples = list(scan_tar(path))
    except (UserError, OSError) as error:
        return _nothing(*problems, str(error))
    rows = slice(int(index.starts[number]), int(index.starts[number + 1]))
    table = np.array([(s.offset, s.length, s.label) for s in samples], dtype=np.int64).reshape(-1, 3)
    indexed = np.stack([index.offsets_N[rows], index.lengths_N[rows], index.labels_N[rows]], axis=1)
    if not np.array_equal(table, indexed):
        problems.append(f"{shard.name}: {_difference(table, indexed)}")
    flaws = []
    with path.open("rb") as file:
        for count, sample in enumerate(samples, 1):
            image = os.pread(file.fileno(), sample.length, sample.offset)
            if reason := flaw(image):
                flaws.append(f"{shard.name}: sample {ascii(sample.key)[1:-1]}: {reason}")
            if count % TOLD_EVERY == 0:
                jobs.advance(TOLD_EVERY)
    jobs.advance(len(samples) % TOLD_EVERY)
    if len(flaws) > SHOWN:
        flaws[SHOWN:] = [f"{shard.name}: and {len(flaws) - SHOWN} more images"]
    return _Found(problems + flaws, [sample.key for sample in samples])


def _nothing(*problems: str) -> _Found:
    return _Found(list(problems), [])


def _difference(table: NDArray[Any], indexed: NDArray[Any]) -> str:
    if len(table) != len(indexed):
        return f"{len(table)} samples, its index says {len(indexed)}"
    i = int((table != indexed).any(axis=1).argmax())
    return f"sample {i} has offset, length, label {table[i].tolist()}, its index says {indexed[i].tolist()}"


def _check_pairs(path: Path, keys: set[str]) -> list[str]:
    try:
        for row in csv.DictReader(io.StringIO(read_text(path), newline="")):
            for column in ("key1", "key2"):
                if row.get(column) not in keys:
                    return [f"{PAIRS}: no sample {row.get(column)!a}, which a pair names"]
    except (UserError, csv.Error) as error:
        return [f"{PAIRS}: {str(error).removeprefix(f'{path}: ')}"]
    return []
