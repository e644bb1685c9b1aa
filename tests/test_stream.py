import itertools
import tarfile
from collections import Counter
from pathlib import Path

import fsspec
import pytest
from test_data import NUM_SAMPLES, SIZE, png
from web import Fault, served

from trainer import address, remote
from trainer.address import Url
from trainer.augment import build_train_transform
from trainer.errors import UserError
from trainer.order import Position
from trainer.shards import write_shards
from trainer.stream import StreamSource, build_stream_loader, find_shards, shards_of_reader

PATHS = [Path(f"{i}.tar") for i in range(7)]


@pytest.fixture
def folder(tmp_path) -> Path:
    """53 images in shards of 16, 16, 16 and 5: uneven."""
    write_shards([(png(i), "png", i % 7) for i in range(NUM_SAMPLES)], tmp_path / "packed", [*"abcdefg"], 16)
    return tmp_path / "packed"


def stream(folder: Path | Url, *, rank=0, world_size=1, workers=0, start=None, num_classes=7, num_steps=9):
    source = StreamSource(
        shards=find_shards(folder),
        num_classes=num_classes,
        channels=1,
        shuffle_buffer=10,
        smallest_side=None,
        seed=3,
    )
    loader = build_stream_loader(
        source,
        build_train_transform(image_size=SIZE),
        global_batch=12,
        rank=rank,
        world_size=world_size,
        workers=workers,
        start=start or Position(),
        epoch_images=50,
    )
    return list(itertools.islice(loader, num_steps))


@pytest.mark.parametrize(("world_size", "workers"), [(1, 0), (2, 0), (3, 2)])
def test_all_ranks_have_equal_steps_for_as_long_as_asked(folder, world_size, workers):
    for rank in range(world_size):
        steps = stream(folder, rank=rank, world_size=world_size, workers=workers)
        assert [(p.epoch, p.consumed) for _, p in steps[:5]] == [(0, 12), (0, 24), (0, 36), (1, 0), (1, 12)]
        assert {len(batch.labels_N) for batch, _ in steps} == {12 // world_size}
        for batch, _ in steps:
            assert batch.labels_N.tolist() == [int(i) % 7 for i in batch.images_NCHW[:, 0, 0, 0]]


def test_one_reader_sees_every_sample_about_as_often(folder):
    seen = Counter(int(i) for b, _ in stream(folder, num_steps=53) for i in b.images_NCHW[:, 0, 0, 0])
    assert len(seen) == NUM_SAMPLES
    assert max(seen.values()) - min(seen.values()) <= 2  # 12 passes, the last one in the buffer


def test_remote_shards_give_the_batches_of_local_ones_with_an_index_and_without(folder, monkeypatch):
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.001)
    with served(folder) as web:
        web.choose = lambda path, count: Fault(
            cut_after=5000 if path.endswith(".tar") and count % 3 else None
        )
        for address in (web.url(), web.url("/data-{000000..000003}.tar")):
            pairs = zip(stream(folder), stream(Url(address)), strict=True)
            assert all(here.images_NCHW.equal(there.images_NCHW) for (here, _), (there, _) in pairs)
    assert {request.range for request in web.of("/data-000001.tar")} >= {None, "bytes=5000-"}


def test_shards_of_an_object_store_are_streamed_through_fsspec(folder, monkeypatch):
    monkeypatch.setattr(address, "SCHEMES", (*address.SCHEMES, "memory"))
    for path in folder.glob("*.tar"):
        fsspec.filesystem("memory").pipe_file(f"/bucket/streamed/{path.name}", path.read_bytes())
    pairs = zip(
        stream(folder), stream(Url("memory://bucket/streamed/data-{000000..000003}.tar")), strict=True
    )
    assert all(here.images_NCHW.equal(there.images_NCHW) for (here, _), (there, _) in pairs)


@pytest.mark.parametrize("workers", [0, 1])
def test_remote_shards_that_are_truncated_or_gone_are_named_without_credentials(folder, workers, monkeypatch):
    monkeypatch.setenv("NETRC", "/nonexistent")
    path = folder / "data-000002.tar"
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        last_sample = tar.getmembers()[-2].offset
    with served(folder) as web:
        shards = Url(web.url("/data-{000000..000003}.tar", user="ann:hunter2@"))
        for end in (last_sample, last_sample + 600):
            path.write_bytes(whole[:end])
            message = r"^rank 0: http\S*/data-000002.tar: truncated(: no end of archive| or not a tar)[^@]*$"
            with pytest.raises(UserError, match=message):
                stream(shards, workers=workers)
        path.unlink()
        with pytest.raises(
            UserError, match=r"^rank 0: data.train: http\S*/data-000002.tar: answered 404[^@]*$"
        ):
            stream(shards, workers=workers)
        with pytest.raises(UserError, match=r"index/index.json: answered 404"):
            stream(Url(web.url("/elsewhere")))


def test_a_resumed_run_goes_on_with_other_samples(folder):
    images = [stream(folder, start=Position(0, c), num_steps=1)[0][0].images_NCHW for c in (0, 0, 12)]
    assert images[0].equal(images[1])
    assert not images[0].equal(images[2])


@pytest.mark.parametrize("readers", [1, 2, 3, 7])
def test_every_pass_deals_each_shard_to_one_reader_in_another_order(readers):
    passes = []
    for turn in range(3):
        of_readers = []
        for reader in range(readers):
            share = len(PATHS[reader::readers])
            shards = itertools.islice(
                shards_of_reader(PATHS, 1, Position(), reader, readers), turn * share, (turn + 1) * share
            )
            of_readers.append(tuple(shards))
        assert sorted(itertools.chain(*of_readers)) == PATHS
        passes.append(tuple(of_readers))
    assert len(set(passes)) == 3


def test_readers_without_a_shard_of_their_own_go_through_all_in_their_own_order():
    firsts = [
        tuple(itertools.islice(shards_of_reader(PATHS, 1, Position(), reader, 9), 7)) for reader in range(9)
    ]
    assert all(sorted(shards) == PATHS for shards in firsts)
    assert len(set(firsts)) > 6


@pytest.mark.parametrize("cut", [512, 1024, 3000, 20000])
def test_a_truncated_shard_is_named_before_training(folder, cut):
    path = folder / "data-000001.tar"
    content = path.read_bytes().rstrip(b"\0")
    path.write_bytes(content[: max(100, len(content) - cut)])
    with pytest.raises(UserError, match=r"data-000001.tar: truncated: no end of archive"):
        stream(folder)


@pytest.mark.parametrize("workers", [0, 1])
def test_what_a_stream_cannot_use_is_named_in_one_line(folder, workers):
    with pytest.raises(UserError, match=r"rank 0: .*tar, sample \d+: label \d, but head.num_classes is 3"):
        stream(folder, num_classes=3, workers=workers)
    path = folder / "data-000002.tar"
    path.write_bytes(path.read_bytes().replace(b".cls", b".xls"))
    with pytest.raises(UserError, match=r"rank 0: .*data-000002.tar"):
        stream(folder, workers=workers)
