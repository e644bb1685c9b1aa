"""Bad samples: replaced by the same on any number of ranks, written down, limited, skipped when known."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from test_data import NUM_SAMPLES, RANDOM, SIZE, START, pixels_of, png

from trainer.augment import build_train_transform
from trainer.data import build_train_loader
from trainer.errors import UserError
from trainer.index import Index, open_index
from trainer.ledger import BadSample, Ledger, read_quarantine
from trainer.order import epoch_order, replacement_key
from trainer.shards import write_shards

BAD = (3, 20, 41)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    folder = tmp_path_factory.mktemp("bad") / "packed"
    samples = [(b"garbage" if i in BAD else png(i), "png", i % 7) for i in range(NUM_SAMPLES)]
    write_shards(samples, folder, [f"class {i}" for i in range(7)], samples_per_shard=16)
    return open_index(folder, "data.train")


def ledger(folder: Path, rank: int = 0, world_size: int = 1, fraction: float = 0.2) -> Ledger:
    return Ledger(
        folder, rank=rank, world_size=world_size, num_samples=NUM_SAMPLES, max_bad_fraction=fraction
    )


def steps(index: Index, folder: Path | None, *, world_size=1, workers=0, num_steps=4, start=START, **options):
    """Return (images, labels, bad positions) of whole global batches, put together from simulated ranks."""
    per_rank = []
    for rank in range(world_size):
        loader = build_train_loader(
            index,
            options.get("transform", RANDOM),
            channels=1,
            global_batch=12,
            accumulation=1,
            seed=5,
            rank=rank,
            world_size=world_size,
            workers=workers,
            start=start,
            ledger=None if folder is None else ledger(folder, rank, world_size),
            quarantine=options.get("quarantine", frozenset()),
        )
        per_rank.append([batch for batch, _ in itertools.islice(loader, num_steps)])
    return [
        (
            torch.cat([batch.images_NCHW for batch in of_ranks]),
            torch.cat([batch.labels_N for batch in of_ranks]),
            sorted(bad.position for batch in of_ranks for bad in batch.bad),
        )
        for of_ranks in zip(*per_rank, strict=True)
    ]


def same(left, right) -> bool:
    return all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a, b in zip(left, right, strict=True))


def lines(folder: Path) -> list[dict]:
    files = sorted(folder.glob("rank-*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def test_a_bad_sample_is_replaced_by_what_the_key_says(index, tmp_path):
    plain = build_train_transform(image_size=SIZE)
    found = steps(index, tmp_path, transform=plain)
    order = epoch_order(NUM_SAMPLES, 5, 0)[:48]
    for position, sample in enumerate(order.tolist()):
        attempt = 0
        while sample in BAD:
            sample = replacement_key(5, 0, position, attempt) % NUM_SAMPLES
            attempt += 1
        images, labels, _ = found[position // 12]
        assert images[position % 12, 0].tolist() == pixels_of(sample).tolist()
        assert int(labels[position % 12]) == sample % 7
    met = [p for p, sample in enumerate(order.tolist()) if sample in BAD]
    assert set(met) <= {position for step in found for position in step[2]}


@pytest.mark.parametrize(("world_size", "workers"), [(1, 1), (2, 0), (3, 2), (4, 0)])
def test_pixels_of_replacements_do_not_depend_on_ranks_and_workers(index, tmp_path, world_size, workers):
    one = steps(index, tmp_path / "one")
    other = steps(index, tmp_path / "other", world_size=world_size, workers=workers)
    assert same(one, other)
    assert [step[2] for step in one] == [step[2] for step in other]
    assert {line["offset"] for line in lines(tmp_path / "one")} == {
        line["offset"] for line in lines(tmp_path / "other")
    }


def test_the_ledger_names_each_bad_sample_once_also_after_a_restart(index, tmp_path):
    steps(index, tmp_path, num_steps=8)
    steps(index, tmp_path, num_steps=8)
    found = lines(tmp_path)
    assert sorted(line["key"] for line in found) == [f"0000000{i:02d}.png" for i in BAD]
    assert {line["reason"] for line in found} == {"cannot decode: not one of PNG, JPEG, WEBP, BMP"}
    for line in found:
        sample = index.find(line["shard"], line["offset"])
        assert sample == int(line["key"][:9])


def test_a_last_line_that_was_cut_is_dropped_and_other_damage_is_not(index, tmp_path):
    steps(index, tmp_path, num_steps=8)
    path, other, whole = tmp_path / "rank-00000.jsonl", tmp_path / "rank-00007.jsonl", lines(tmp_path)
    path.write_bytes(path.read_bytes()[:-9])
    other.write_bytes(b'{"shard": "data-0')  # of a rank that this run does not have any more
    with pytest.raises(UserError, match=r"rank-00000\.jsonl: line 3 does not name shard and offset"):
        read_quarantine(path, index.find)
    steps(index, tmp_path, num_steps=8)
    other.unlink()
    assert sorted(lines(tmp_path), key=str) == sorted(whole, key=str)
    path.write_bytes(b"{\n" + path.read_bytes())
    with pytest.raises(UserError, match=r"rank-00000\.jsonl: line 1 does not name shard and offset"):
        ledger(tmp_path)


def test_what_is_in_quarantine_is_replaced_unseen_by_the_same_samples(index, tmp_path):
    replaced = steps(index, tmp_path, num_steps=8)
    known = read_quarantine(tmp_path, index.find)
    assert known == set(BAD)
    stopped_at_nothing = steps(index, None, num_steps=8, quarantine=known)
    assert same(replaced, stopped_at_nothing)
    assert not any(step[2] for step in stopped_at_nothing)
    (file,) = tmp_path.glob("*.jsonl")
    assert read_quarantine(file, index.find) == known


def test_without_a_ledger_a_bad_sample_stops(index):
    with pytest.raises(UserError, match=r"rank 0: data.train: shard .*: cannot decode"):
        steps(index, None)


def test_more_bad_samples_than_allowed_stop_in_one_line(index, tmp_path):
    steps(index, tmp_path / "all", num_steps=8)
    met = [BadSample(**line) for line in lines(tmp_path / "all")]
    enough = ledger(tmp_path / "enough", fraction=3 / NUM_SAMPLES)
    for bad in met + met:
        enough.add(bad)
    short = ledger(tmp_path / "short", fraction=2 / NUM_SAMPLES)
    for bad in met[:2] + met[:2]:
        short.add(bad)
    with pytest.raises(UserError) as caught:
        short.add(met[2])
    assert str(caught.value).startswith(
        "data.max_bad_fraction: more than 0.0377358 of the data is bad (3 samples so far); the last: shard"
    )
    of_two = ledger(tmp_path / "two", world_size=2, fraction=2 / NUM_SAMPLES)
    of_two.add(met[0])
    with pytest.raises(UserError, match=r"data.max_bad_fraction: "):
        of_two.add(met[1])  # two of this rank are about four of both


def test_a_set_of_nothing_but_bad_samples_ends(tmp_path):
    write_shards([(b"garbage", "png", 0)] * 12, tmp_path / "packed", ["only"])
    with pytest.raises(UserError, match="20 replacements in a row are bad"):
        steps(open_index(tmp_path / "packed", "data.train"), tmp_path / "ledger", num_steps=1)


def test_a_quarantine_that_does_not_fit_is_refused_in_one_line(index, tmp_path):
    path = tmp_path / "list.jsonl"
    with pytest.raises(UserError, match=r"data.quarantine: .* does not exist"):
        read_quarantine(path, index.find)
    path.write_text('{"shard": "data-000000.tar", "offset": 7}\n')
    with pytest.raises(
        UserError, match=r"list.jsonl is of other data: there is no sample at byte 7 of shard"
    ):
        read_quarantine(path, index.find)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="line 1 does not name shard and offset as JSON"):
        read_quarantine(path, index.find)
