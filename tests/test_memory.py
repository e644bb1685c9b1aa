"""The memory of workers stays what it was, however large the index is."""

import io
import itertools
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from trainer.augment import build_train_transform
from trainer.data import build_train_loader
from trainer.index import ARRAYS, Index, open_index, write_index
from trainer.ledger import Ledger
from trainer.order import Position

NUM_SHARDS, NUM_CLASSES, BATCH = 500, 1000, 500


def large_index(folder: Path, num_samples: int) -> Index:
    """An index of that many samples that are all the same image, in shards that are all the same file."""
    buffer = io.BytesIO()
    Image.new("L", (2, 2), 7).save(buffer, "PNG")
    image = buffer.getvalue()
    first = folder / "0.tar"
    first.write_bytes(bytes(512) + image + bytes(2048 - 512 - len(image)))
    for number in range(1, NUM_SHARDS):
        os.link(first, folder / f"{number}.tar")
    shard = {"n": num_samples // NUM_SHARDS, "bytes": 2048, "sha256": "0" * 64}
    head = {
        "fingerprint": "0" * 64,
        "num_samples": num_samples,
        "num_classes": NUM_CLASSES,
        "class_names": [],
        "class_statistics": {},
        "shards": [{"name": f"{number}.tar", **shard} for number in range(NUM_SHARDS)],
    }
    values = {"offset": 512, "length": len(image), "label": np.arange(num_samples) % NUM_CLASSES}
    columns = {name: np.full(num_samples, values[name], kind) for name, kind in ARRAYS.items()}
    write_index(folder, head, columns)
    return open_index(folder, "data.train")


def private_mib(process: int) -> float:
    """What a process has for itself: pages that it wrote to, or that nobody else maps."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) / 1024


def memory_of_workers(index: Index, run: Path, start: Position, steps: int) -> list[list[float]]:
    """Private MiB of each worker, at each tenth of the steps from the second tenth on."""
    batches = build_train_loader(
        index,
        build_train_transform(image_size=2, flip_probability=0.5),
        channels=1,
        global_batch=BATCH,
        accumulation=1,
        seed=0,
        rank=0,
        world_size=1,
        workers=2,
        start=start,
        ledger=Ledger(run, rank=0, world_size=1, num_samples=index.num_samples, max_bad_fraction=0.1),
        quarantine=frozenset(range(0, index.num_samples, 1000)),
    )
    measured = []
    try:
        for step, _ in enumerate(itertools.islice(batches, steps), 1):
            if step % (steps // 10) == 0:
                measured.append([private_mib(w.pid) for w in multiprocessing.active_children()])
    finally:
        batches.close()
    return [list(of_worker) for of_worker in zip(*measured[1:], strict=True)]


def test_workers_do_not_grow_while_they_read_an_index_of_a_million_samples(tmp_path):
    index = large_index(tmp_path, 1_000_000)
    for of_worker in memory_of_workers(index, tmp_path / "run", Position(), 10):
        assert max(of_worker) - of_worker[0] < 3, of_worker  # 0.3; 7 with the labels in a list


@pytest.mark.nightly
def test_workers_do_not_grow_from_one_epoch_of_ten_million_samples_into_the_next(tmp_path):
    """100 000 random samples touch every page of the index five times on average, as a whole epoch would."""
    index = large_index(tmp_path, 10_000_000)
    steps = 200
    start = Position(0, index.num_samples - steps // 2 * BATCH)
    for of_worker in memory_of_workers(index, tmp_path / "run", start, steps):
        assert max(of_worker) - of_worker[0] < 4, of_worker
