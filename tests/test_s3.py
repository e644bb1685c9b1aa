"""Data sets in S3: through s3fs, from a server on this machine. Needs ``pip install s3fs 'moto[server]'``."""

import itertools
import socket
import time
from importlib.util import find_spec
from pathlib import Path

import fsspec
import pytest
from test_cache import pack_pictures

from trainer import remote
from trainer.address import Url
from trainer.augment import build_train_transform
from trainer.cache import open_data_set
from trainer.config import DataConfig
from trainer.data import build_train_loader
from trainer.errors import UserError
from trainer.order import Position
from trainer.shards import build_index
from trainer.stream import StreamSource, build_stream_loader, find_shards

SECRET = "hunter2"
missing = [name for name in ("s3fs", "moto") if find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{' and '.join(missing)} not installed")


def use(monkeypatch, address: str) -> None:
    """Say as a user does, by environment variables alone, where S3 is and who asks."""
    for name, value in {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "AKIATEST",
        "AWS_SECRET_ACCESS_KEY": SECRET,
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/nonexistent",
        "AWS_SHARED_CREDENTIALS_FILE": "/nonexistent",
        "no_proxy": "*",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.01)
    fsspec.get_filesystem_class("s3").clear_instance_cache()


@pytest.fixture(scope="module")
def address():
    from moto.server import ThreadedMotoServer

    moto = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    yield f"http://{host}:{port}"
    moto.stop()


@pytest.fixture
def packed(tmp_path, monkeypatch, address) -> Path:
    """A data set in a folder, and the same in s3://bucket/my set, with names that an address would encode."""
    use(monkeypatch, address)
    folder = pack_pictures(tmp_path / "packed", 0, 12).folder
    (folder / "data-000001.tar").rename(folder / "a+b %20 \u00e9.tar")
    build_index(folder)
    store = fsspec.filesystem("s3")
    store.makedirs("bucket", exist_ok=True)
    store.put(f"{folder}/", "bucket/my set/", recursive=True)
    return folder


def digests(index, workers: int) -> list[int]:
    transform = build_train_transform(image_size=6)
    options = {"channels": 3, "global_batch": 4, "accumulation": 1, "seed": 2, "rank": 0, "world_size": 1}
    steps = build_train_loader(
        index, transform, **options, workers=workers, start=Position(), with_digests=True
    )
    try:
        return [int(batch.digests_N.sum()) for batch, _ in itertools.islice(steps, 7)]
    finally:
        steps.close()


def opened(tmp_path: Path, place: str):
    data = DataConfig(train="unused", cache_dir=tmp_path / "cache")
    return open_data_set(Url(place), "data.train", data)


def refusal(tmp_path: Path, place: str) -> str:
    with pytest.raises(UserError) as caught:
        opened(tmp_path, place).read(0)
    message = str(caught.value)
    assert message.startswith(f"data.train: {place}/")
    assert SECRET not in message
    assert message.isprintable()
    return message


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_from_s3_are_those_of_the_folder(packed, tmp_path, workers):
    there = opened(tmp_path, "s3://bucket/my set")
    assert digests(there, workers) == digests(build_index(packed), 0)
    assert not any(SECRET.encode() in p.read_bytes() for p in (tmp_path / "cache").rglob("*") if p.is_file())


@pytest.mark.parametrize("place", ["s3://bucket/my set", "s3://bucket/my set/data-{000002..000005}.tar"])
def test_shards_in_s3_are_streamed(packed, place):
    source = StreamSource(
        shards=find_shards(Url(place)),
        num_classes=2,
        channels=3,
        shuffle_buffer=4,
        smallest_side=None,
        seed=1,
    )
    options = {"global_batch": 4, "rank": 0, "world_size": 1, "workers": 1, "epoch_images": 12}
    transform = build_train_transform(image_size=6)
    steps = build_stream_loader(source, transform, **options, start=Position())
    assert sum(len(batch.labels_N) for batch, _ in itertools.islice(steps, 6)) == 24
    steps.close()


def test_what_is_not_there_is_told_at_once(packed, tmp_path):
    begin = time.monotonic()
    assert refusal(tmp_path, "s3://bucket/other").endswith("/index/index.json: is not there")
    assert refusal(tmp_path, "s3://elsewhere/set").endswith("/index/index.json: is not there")
    fsspec.filesystem("s3").rm("bucket/my set/a+b %20 \u00e9.tar")
    assert refusal(tmp_path, "s3://bucket/my set").endswith("/a+b %20 \u00e9.tar: is not there")
    assert time.monotonic() - begin < 10


def test_a_server_that_is_silent_or_gone_is_left_in_bounded_time(tmp_path, monkeypatch):
    s3 = fsspec.get_filesystem_class("s3")
    monkeypatch.setattr(s3, "read_timeout", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for word in ("ReadTimeoutError", "ConnectTimeoutError|EndpointConnectionError|ConnectionClosedError"):
            use(monkeypatch, address)
            begin = time.monotonic()
            message = refusal(tmp_path, "s3://bucket/set")
            assert any(name in message for name in word.split("|")), message
            assert time.monotonic() - begin < 20
            silent.close()
