import errno
import os
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hostile import fuzz
from hypothesis import given
from hypothesis import strategies as st

from trainer import index
from trainer.errors import UserError
from trainer.index import ARRAYS, open_index
from trainer.shards import build_index, write_shards


def image(i: int) -> bytes:
    """An index does not look into images."""
    return b"image %d " % i * (i + 1)


def write(folder, count: int, samples_per_shard: int) -> index.Index:
    samples = ((image(i), "png", i % 2) for i in range(count))
    return write_shards(samples, folder, ["ant", "bee", "cat"], samples_per_shard)


def cleared(packed: index.Index, name: str) -> Path:
    """Return the path of an array whose file is gone: what is mapped must not shrink."""
    path = packed.folder / "index" / f"{name}.npy"
    path.unlink()
    return path


@pytest.fixture
def packed(tmp_path):
    return write(tmp_path / "out", 10, samples_per_shard=4)


def test_sample_is_found_in_its_shard(packed):
    assert [(shard.name, shard.n) for shard in packed.shards] == [
        ("data-000000.tar", 4),
        ("data-000001.tar", 4),
        ("data-000002.tar", 2),
    ]
    for i in range(10):
        name, offset = packed.locate(i)
        assert name == packed.shards[i // 4].name
        assert (packed.folder / name).read_bytes()[offset:].startswith(image(i) + b"\0")
        assert packed.read(i) == image(i)
        assert packed.describe(i) == f"{packed.field}: shard {name}, sample 00000000{i}.png"


def test_columns_are_memory_mapped(packed):
    assert all(isinstance(c, np.memmap) for c in (packed.offsets_N, packed.lengths_N, packed.labels_N))


def test_index_survives_pickling_and_forking(packed):
    packed.read(0)
    copy = pickle.loads(pickle.dumps(packed))
    assert copy.field == packed.field
    assert copy.read(9) == image(9)
    child = os.fork()
    if child == 0:
        os._exit(0 if [packed.read(i) for i in range(10)] == [image(i) for i in range(10)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert packed.read(3) == image(3)


def num_open_in(folder: Path) -> int:
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(d) and os.readlink(d).startswith(f"{folder}/data-") for d in descriptors)


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(index, "MAX_OPEN_FILES", 2)
    packed = write(tmp_path / "out", 5, samples_per_shard=1)
    assert [packed.read(i) for i in (0, 1, 2, 0, 4, 3)] == [image(i) for i in (0, 1, 2, 0, 4, 3)]
    assert num_open_in(tmp_path / "out") == 2
    del packed
    assert num_open_in(tmp_path / "out") == 0


@pytest.mark.parametrize(
    "damage", ["missing folder", "no index", "shard missing", "shard cut", "version", "json"]
)
def test_open_index_refuses_in_one_line_what_is_not_whole(packed, tmp_path, damage):
    folder, head = packed.folder, packed.folder / "index" / "index.json"
    shard = folder / "data-000001.tar"
    if damage == "missing folder":
        folder, expected = tmp_path / "nowhere", f"data.train: {tmp_path / 'nowhere'} does not exist"
    elif damage == "no index":
        head.unlink()
        expected = f"data.train: {folder} has no index; run python launch/pack.py index {folder}"
    elif damage == "shard missing":
        shard.unlink()
        expected = f"data.train: shard {shard} is missing"
    elif damage == "shard cut":
        size = shard.stat().st_size
        os.truncate(shard, size - 512)
        expected = f"data.train: shard {shard} has {size - 512} bytes, its index says {size}"
    elif damage == "version":
        head.write_text(head.read_text().replace('"version": 1', '"version": 99'))
        expected = f"data.train: the index of {folder} is broken (it has version 99, this code reads 1); "
    else:
        head.write_text("{")
        expected = f"data.train: the index of {folder} is broken ("
    with pytest.raises(UserError) as caught:
        open_index(folder, "data.train")
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["offset", "length", "label"])
def test_open_index_refuses_a_column_of_another_data_set(packed, column):
    np.save(cleared(packed, column), np.zeros(9, dtype=ARRAYS[column]))
    with pytest.raises(UserError, match=f"{column}.npy is int"):
        open_index(packed.folder, "data.train")


@pytest.mark.parametrize("content", [b"", b"\x93NUMPY", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"garbage"])
def test_open_index_refuses_a_column_that_is_no_array(packed, content):
    cleared(packed, "label").write_bytes(content)
    with pytest.raises(UserError, match="is broken") as caught:
        open_index(packed.folder, "data.train")
    assert "\n" not in str(caught.value)


def test_labels_outside_of_the_classes_are_refused(packed):
    labels_N = np.array([0, 3] * 5, dtype=ARRAYS["label"])
    np.save(cleared(packed, "label"), labels_N)
    with pytest.raises(UserError, match=r"label.npy has labels outside 0\.\.2"):
        open_index(packed.folder, "data.train")


def test_open_index_never_unpickles(packed):
    np.save(cleared(packed, "label"), np.array([print] * 10, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is broken"):
        open_index(packed.folder, "data.train")


def test_shard_that_shrinks_while_open_is_a_short_read(packed):
    os.truncate(packed.folder / "data-000002.tar", packed.locate(8)[1] + 10)
    with pytest.raises(
        UserError, match=r"shard data-000002.tar, sample 000000008.png: cannot read: 10 of \d+ bytes"
    ):
        packed.read(8)


def test_many_samples_come_in_the_order_asked(packed):
    asked = [9, 0, 3, 3, 8, 1]
    assert packed.read_many(asked) == [image(i) for i in asked]
    assert packed.read_many([]) == []


class Storage:
    """Stands in for os.pread: fails so many times first."""

    def __init__(self, error: int, times: int, monkeypatch) -> None:
        self.error, self.left, self.real, self.waits = error, times, os.pread, []
        monkeypatch.setattr(os, "pread", self)
        monkeypatch.setattr(index.time, "sleep", self.waits.append)

    def __call__(self, *arguments) -> bytes:
        if self.left:
            self.left -= 1
            raise OSError(self.error, os.strerror(self.error))
        return self.real(*arguments)


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE])
def test_an_error_of_the_storage_is_tried_again_and_then_raised(packed, monkeypatch, error):
    storage = Storage(error, 2, monkeypatch)
    assert packed.read(3) == image(3)
    assert storage.waits == [0.1, 1.0]
    storage.left = 99
    with pytest.raises(UserError, match=r"shard data-000000.tar, sample .*: cannot read: "):
        packed.read(3)
    storage.left = 0
    assert packed.read(3) == image(3)


def test_an_error_that_will_not_pass_is_raised_at_once(packed, monkeypatch):
    storage = Storage(errno.EACCES, 1, monkeypatch)
    with pytest.raises(UserError, match="cannot read: Permission denied"):
        packed.read(3)
    assert storage.waits == []


@fuzz(12)
@given(
    contents=st.lists(st.binary(min_size=1, max_size=1100), min_size=1, max_size=9),
    samples_per_shard=st.integers(1, 4),
    data=st.data(),
)
def test_any_images_are_found_by_number_by_place_and_by_a_second_indexing(contents, samples_per_shard, data):
    with tempfile.TemporaryDirectory() as folder:
        samples = ((content, "png", len(content) % 3) for content in contents)
        written = write_shards(samples, Path(folder) / "set", ["ant", "bee", "cat"], samples_per_shard)
        asked = data.draw(st.lists(st.integers(0, len(contents) - 1), max_size=12), "asked")
        assert written.read_many(asked) == [contents[i] for i in asked]
        assert written.labels_N.tolist() == [len(content) % 3 for content in contents]
        for i in range(len(contents)):
            assert written.find(*written.locate(i)) == i
            assert written.member_name(i) == f"{i:09d}.png"
        again = build_index(written.folder)
        assert again.fingerprint == written.fingerprint
        for name in ("starts", "offsets_N", "lengths_N", "labels_N"):
            assert np.array_equal(getattr(again, name), getattr(written, name))
