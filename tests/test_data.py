import hashlib
import io
import itertools
import multiprocessing
import random
import struct

import numpy as np
import pytest
import torch
from PIL import Image

from trainer.augment import build_eval_transform, build_train_transform
from trainer.data import Batch, build_eval_loader, build_train_loader
from trainer.errors import UserError
from trainer.index import open_index
from trainer.order import Position, epoch_order
from trainer.shards import write_shards

NUM_SAMPLES = 53
SIZE = 8


def pixels_of(i: int) -> np.ndarray:
    pixels = np.random.RandomState(i).randint(0, 256, (SIZE, SIZE), dtype=np.uint8)
    pixels[0, 0] = i  # says which sample it is
    return pixels


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels_of(i)).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder, spoil: int | None = None):
    """Pack 53 images into shards of 16, 16, 16 and 5; ``spoil`` becomes garbage."""
    samples = [(b"garbage" if i == spoil else png(i), "png", i % 7) for i in range(NUM_SAMPLES)]
    write_shards(samples, folder, [f"class {i}" for i in range(7)], samples_per_shard=16)
    return open_index(folder, "data.train")


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write(tmp_path_factory.mktemp("data") / "packed")


START = Position()
PLAIN = build_train_transform(image_size=SIZE)
RANDOM = build_train_transform(image_size=SIZE, crop_scale=(0.3, 1.0), flip_probability=0.5, color_jitter=0.4)


def train(index, *, rank=0, world_size=1, workers=0, accumulation=1, start=START, **options):
    options = {"transform": RANDOM, "global_batch": 12, "seed": 5, **options}
    return build_train_loader(
        index,
        options.pop("transform"),
        channels=1,
        accumulation=accumulation,
        rank=rank,
        world_size=world_size,
        workers=workers,
        start=start,
        **options,
    )


def global_steps(index, num_steps, *, world_size=1, accumulation=1, **options):
    """Return (images, labels, position, digest) of whole global batches, joined from simulated ranks."""
    per_rank = [
        list(
            itertools.islice(
                train(
                    index,
                    rank=rank,
                    world_size=world_size,
                    accumulation=accumulation,
                    with_digests=True,
                    **options,
                ),
                num_steps,
            )
        )
        for rank in range(world_size)
    ]
    steps = []
    for of_ranks in zip(*per_rank, strict=True):
        assert len({position for _, position in of_ranks}) == 1
        assert all(bool(batch.valid_N.all()) for batch, _ in of_ranks)
        micro = len(of_ranks[0][0].labels_N) // accumulation
        slices = [slice(a * micro, (a + 1) * micro) for a in range(accumulation)]
        images = torch.cat([batch.images_NCHW[s] for s in slices for batch, _ in of_ranks])
        labels = torch.cat([batch.labels_N[s] for s in slices for batch, _ in of_ranks])
        digest = sum(int(batch.digests_N.sum()) for batch, _ in of_ranks) % 2**64
        steps.append((images, labels, of_ranks[0][1], digest))
    return steps


def same(left, right) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2:] == b[2:]
        for a, b in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def six_steps(index):
    return global_steps(index, 6)


def test_batches_are_the_images_and_labels_of_the_epochs_order(index):
    steps = global_steps(index, 8, transform=PLAIN)
    expected = [
        epoch_order(NUM_SAMPLES, 5, epoch)[s * 12 : s * 12 + 12] for epoch in (0, 1) for s in range(4)
    ]
    for (images, labels, *_), samples in zip(steps, expected, strict=True):
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert np.array_equal(images.numpy(), np.stack([pixels_of(i) for i in samples])[:, None])
        assert labels.tolist() == [i % 7 for i in samples]


def test_every_sample_comes_at_most_once_in_an_epoch_and_only_the_tail_is_left_out(index):
    steps = global_steps(index, 8, transform=PLAIN)
    for epoch in (steps[:4], steps[4:]):
        seen = [int(i) for images, *_ in epoch for i in images[:, 0, 0, 0]]
        assert len(set(seen)) == len(seen) == 48
    assert [(p.epoch, p.consumed) for _, _, p, _ in steps[:5]] == [(0, 12), (0, 24), (0, 36), (1, 0), (1, 12)]


@pytest.mark.parametrize(("workers", "accumulation"), [(0, 1), (0, 2), (1, 1), (2, 1), (2, 2)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_ranks_workers_and_accumulation_do_not_change_global_batches(
    index, six_steps, world_size, workers, accumulation
):
    if accumulation == 2 and world_size == 4:
        options = {"global_batch": 24}
        expected = global_steps(index, 3, **options)
    else:
        options, expected = {}, six_steps
    steps = global_steps(
        index, len(expected), world_size=world_size, workers=workers, accumulation=accumulation, **options
    )
    assert same(steps, expected)


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (3, 0), (2, 1)])
def test_resume_in_the_middle_of_an_epoch_goes_on_with_the_same_pixels(index, six_steps, world_size, workers):
    # Saved while prefetching workers are ahead: the position counts what arrived.
    loader = train(index, rank=1, world_size=2, workers=1)
    for _ in range(2):
        _, saved = next(loader)
    assert saved == Position(0, 24)
    assert same(global_steps(index, 4, world_size=world_size, workers=workers, start=saved), six_steps[2:])


def test_resume_with_another_global_batch_repeats_nothing(index):
    first = global_steps(index, 2, transform=PLAIN)
    rest = global_steps(index, 3, transform=PLAIN, start=first[-1][2], global_batch=9)
    seen = [int(i) for images, *_ in first + rest for i in images[:, 0, 0, 0]]
    assert len(set(seen)) == len(seen) == 51
    assert rest[-1][2] == Position(1, 0)


def test_start_in_a_tail_too_short_for_the_batch_is_the_next_epoch(index):
    [(images, _, position, _)] = global_steps(index, 1, transform=PLAIN, start=Position(0, 48))
    assert images[:, 0, 0, 0].tolist() == epoch_order(NUM_SAMPLES, 5, 1)[:12].tolist()
    assert position == Position(1, 12)


def test_seed_and_epoch_change_the_augmentation_of_a_sample(index):
    images_of_0 = []
    for seed, epoch in [(5, 0), (5, 1), (6, 0)]:
        place = epoch_order(NUM_SAMPLES, seed, epoch).tolist().index(0)
        [(images, *_)] = global_steps(
            index, 1, seed=seed, global_batch=1, transform=RANDOM, start=Position(epoch, place)
        )
        images_of_0.append(images.numpy().tobytes())
    assert len(set(images_of_0)) == 3


def test_two_places_of_one_batch_are_augmented_differently(tmp_path):
    index = write_shards([(png(0), "png", 0)] * 8, tmp_path / "packed", ["only"])
    [(images, *_)] = global_steps(index, 1, global_batch=8)
    assert len({image.numpy().tobytes() for image in images}) == 8


def test_loader_leaves_the_callers_random_state_alone(index):
    def state():
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    before = state()
    for workers in (0, 1):
        next(train(index, workers=workers))
        next(iter(evaluate(index, workers=workers)))
    assert state() == before


def longhand_digest(epoch, position, image, label) -> int:
    data = struct.pack("<qqq", epoch, position, label) + image.numpy().tobytes()
    return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)


def test_digests_add_up_to_the_same_number_for_any_ranks(index, six_steps):
    for world_size, accumulation in [(1, 1), (2, 3), (3, 2), (4, 1)]:
        loaders = [
            train(index, rank=r, world_size=world_size, accumulation=accumulation, with_digests=True)
            for r in range(world_size)
        ]
        for step in range(5):
            total = sum(next(loader)[0].digests_N.sum() for loader in loaders)  # wraps, as an all-reduce does
            epoch, consumed = divmod(step * 12, 48)
            images, labels, *_ = six_steps[step]
            expected = sum(longhand_digest(epoch, consumed + i, images[i], int(labels[i])) for i in range(12))
            assert (int(total) - expected) % 2**64 == 0


def digests_of(index, num_steps, world_size, workers=0, start=START):
    """Return the digest of each global batch, and the position after the last, from simulated ranks."""
    loaders = [
        train(index, rank=r, world_size=world_size, workers=workers, start=start, with_digests=True)
        for r in range(world_size)
    ]
    totals = []
    for _ in range(num_steps):
        of_ranks = [next(loader) for loader in loaders]
        totals.append(sum(int(batch.digests_N.sum()) for batch, _ in of_ranks) % 2**64)
    return totals, of_ranks[0][1]


@pytest.mark.parametrize("workers", [0, 1, 2])
def test_a_run_stopped_on_two_ranks_and_gone_on_on_three_and_on_one_has_the_same_digests(index, workers):
    expected, _ = digests_of(index, 11, world_size=1)
    assert len(set(expected)) == 11
    position, found = START, []
    for world_size, num_steps in ((2, 2), (3, 5), (1, 1), (4, 3)):  # stops within epochs 0 and 1
        some, position = digests_of(index, num_steps, world_size, workers, position)
        found += some
    assert found == expected


def test_digest_depends_on_the_order():
    image = torch.zeros(1, 2, 2, dtype=torch.uint8)
    assert longhand_digest(0, 0, image, 1) + longhand_digest(0, 1, image, 2) != longhand_digest(
        0, 0, image, 2
    ) + longhand_digest(0, 1, image, 1)


def test_digests_are_not_computed_unless_asked(index):
    assert next(train(index))[0].digests_N is None


def evaluate(index, *, rank=0, world_size=1, workers=0, batch_size=8):
    return build_eval_loader(
        index,
        build_eval_transform(image_size=SIZE),
        channels=3,
        batch_size=batch_size,
        rank=rank,
        world_size=world_size,
        workers=workers,
    )


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 8), (1, 53), (2, 8), (3, 8), (4, 4), (3, 100)])
def test_evaluation_covers_every_sample_once_in_order_with_equal_batches(
    index, world_size, batch_size, workers
):
    loaders = [
        evaluate(index, rank=rank, world_size=world_size, batch_size=batch_size, workers=workers)
        for rank in range(world_size)
    ]
    passes: list[list[Batch]] = [list(loader) for loader in loaders]
    assert len({(len(loader), len(batches)) for loader, batches in zip(loaders, passes, strict=True)}) == 1
    assert len({batch.images_NCHW.shape for batches in passes for batch in batches}) == 1
    seen = []
    for of_ranks in zip(*passes, strict=True):
        for batch in of_ranks:
            assert batch.digests_N is None
            assert (batch.labels_N[~batch.valid_N] == -1).all()
            assert batch.labels_N[batch.valid_N].tolist() == [
                int(i) % 7 for i in batch.images_NCHW[batch.valid_N, 0, 0, 0]
            ]
            seen += batch.images_NCHW[batch.valid_N, 0, 0, 0].tolist()
    assert seen == list(range(NUM_SAMPLES))


def test_evaluation_can_be_repeated(index):
    loader = evaluate(index)
    first, second = list(loader), list(loader)
    assert all(torch.equal(a.images_NCHW, b.images_NCHW) for a, b in zip(first, second, strict=True))


@pytest.mark.parametrize("workers", [0, 1])
def test_image_that_cannot_be_decoded_is_named_in_one_line(tmp_path, workers):
    index = write(tmp_path / "packed", spoil=20)
    where = "data.train: shard data-000001.tar, sample 000000020.png"
    why = "cannot decode: not one of PNG, JPEG, WEBP, BMP"
    with pytest.raises(UserError) as caught:
        next(train(index, workers=workers, global_batch=NUM_SAMPLES))
    assert type(caught.value) is UserError
    assert str(caught.value) == f"rank 0: {where}: {why}"
    # Sample 20 is in the second global batch, 12 to 23, and there in the last third.
    assert len(list(evaluate(index, rank=0, world_size=3, batch_size=12, workers=workers))) == 5
    with pytest.raises(UserError) as caught:
        list(evaluate(index, rank=2, world_size=3, batch_size=12, workers=workers))
    assert str(caught.value) == f"rank 2: {where}: {why}"
    assert not multiprocessing.active_children()


def test_closing_the_train_loader_ends_its_workers(index):
    loader = train(index, workers=2)
    next(loader)
    assert len(multiprocessing.active_children()) == 2
    loader.close()
    assert not multiprocessing.active_children()


@pytest.mark.parametrize("workers", [0, 1])
def test_shard_that_vanishes_or_shrinks_is_named_in_one_line(tmp_path, workers):
    index = write(tmp_path / "packed")
    shard = tmp_path / "packed" / "data-000003.tar"
    with shard.open("r+b") as file:
        file.truncate(index.locate(48)[1] + 5)
    with pytest.raises(
        UserError, match=r"^rank 0: data.train: shard data-000003.tar, sample .*: cannot read: "
    ):
        list(evaluate(index, workers=workers))
    index = open_again(tmp_path)
    shard.unlink()
    with pytest.raises(UserError, match=r"data-000003.tar, sample at byte \d+: cannot read: No such file"):
        list(evaluate(index, workers=workers))


def open_again(tmp_path):
    again = write_shards(
        [(png(0), "png", 0)] * 49, tmp_path / "packed", ["a"], samples_per_shard=16, overwrite=True
    )
    return open_index(again.folder, "data.train")


def test_batches_that_do_not_fit_are_refused_at_once(index):
    with pytest.raises(
        UserError, match=r"data.batch_size is 12, .* not divisible by 5 ranks x engine.accumulation_steps 1"
    ):
        train(index, world_size=5)
    with pytest.raises(UserError, match=r"data.batch_size is 12, .* 2 ranks x engine.accumulation_steps 4"):
        train(index, world_size=2, accumulation=4)
    with pytest.raises(UserError, match=r"data.batch_size is 60 but data.train holds 53 images"):
        train(index, global_batch=60)
