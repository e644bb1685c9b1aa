import gc
import hashlib
import io
import json
import os
import pickle
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from trainer import shards
from trainer.errors import UserError
from trainer.shards import build_index, open_index, write_shards

NAMES = ["ant", "bee", "cat"]


def png(i: int) -> bytes:
    pixels = np.random.RandomState(i).randint(0, 256, (5 + i % 3, 6), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def make_samples(count: int) -> list[tuple[bytes, str, int]]:
    return [(png(i), "png", i % 2) for i in range(count)]


def write_tar(path, members) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def every_file(folder) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture
def packed(tmp_path):
    return write_shards(make_samples(10), tmp_path / "out", NAMES, samples_per_shard=4)


def test_index_reads_back_what_was_written(packed):
    assert [(shard.name, shard.n) for shard in packed.shards] == [
        ("data-000000.tar", 4),
        ("data-000001.tar", 4),
        ("data-000002.tar", 2),
    ]
    assert packed.num_samples == 10
    assert packed.num_classes == 3
    assert packed.class_names == ("ant", "bee", "cat")
    assert packed.labels_N.tolist() == [0, 1] * 5
    assert [packed.read(i) for i in range(10)] == [png(i) for i in range(10)]
    assert packed.locate(7)[0] == "data-000001.tar"
    assert packed.describe(7) == f"{packed.field}: shard data-000001.tar, sample 000000007.png"
    assert packed.class_statistics == {"min": 0, "mean": 10 / 3, "max": 5, "empty": 1}


def test_index_json_says_what_the_shards_are(packed):
    head = json.loads((packed.folder / "index" / "index.json").read_text())
    assert head["version"] == shards.VERSION
    assert head["num_samples"] == 10
    for shard in head["shards"]:
        content = (packed.folder / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


def test_columns_are_memory_mapped(packed):
    assert all(isinstance(c, np.memmap) for c in (packed.offsets_N, packed.lengths_N, packed.labels_N))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning")
def test_webdataset_itself_reads_the_shards(packed):
    urls = [str(packed.folder / shard.name) for shard in packed.shards]
    rows = list(webdataset.WebDataset(urls, shardshuffle=False, empty_check=False))
    assert [int(row["cls"]) for row in rows] == packed.labels_N.tolist()
    assert [row["png"] for row in rows] == [packed.read(i) for i in range(10)]
    gc.collect()  # webdataset leaves its files open: the warnings belong to this test


def test_two_packs_of_the_same_samples_are_the_same_bytes(packed, tmp_path):
    again = write_shards(make_samples(10), tmp_path / "again", NAMES, samples_per_shard=4)
    assert every_file(packed.folder) == every_file(again.folder)
    with tarfile.open(again.folder / "data-000000.tar") as tar:
        member = tar.next()
    assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")


def test_fingerprint_changes_with_an_image_a_label_and_the_order(tmp_path):
    samples = make_samples(4)
    relabelled = [(image, extension, 2) for image, extension, _ in samples]
    variants = [samples, samples[::-1], samples[:3], relabelled]
    prints = {write_shards(v, tmp_path / str(i), NAMES).fingerprint for i, v in enumerate(variants)}
    assert len(prints) == 4


def test_index_survives_pickling_and_forking(packed):
    packed.read(0)
    copy = pickle.loads(pickle.dumps(packed))
    assert copy.field == packed.field
    assert copy.read(9) == png(9)
    child = os.fork()
    if child == 0:
        os._exit(0 if [packed.read(i) for i in range(10)] == [png(i) for i in range(10)] else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert packed.read(3) == png(3)


def num_open_tars() -> int:
    descriptors = (f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd"))
    return sum(os.path.islink(d) and os.readlink(d).endswith(".tar") for d in descriptors)


def test_more_shards_than_open_files_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_FILES", 2)
    packed = write_shards(make_samples(5), tmp_path / "out", NAMES, samples_per_shard=1)
    assert [packed.read(i) for i in (0, 1, 2, 0, 4, 3)] == [png(i) for i in (0, 1, 2, 0, 4, 3)]
    assert num_open_tars() == 2
    del packed
    assert num_open_tars() == 0


def test_interrupted_pack_leaves_nothing_that_looks_complete(tmp_path):
    def broken():
        yield from make_samples(5)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), out, NAMES, samples_per_shard=2)
    assert not shards.is_packed(out)
    assert not list(out.glob("*.tar"))
    assert write_shards(make_samples(3), out, NAMES).num_samples == 3
    assert sorted(p.name for p in out.iterdir()) == ["data-000000.tar", "index"]


def test_interrupted_overwrite_keeps_the_old_data_set(packed):
    before = every_file(packed.folder)

    def broken():
        yield from make_samples(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), packed.folder, NAMES, overwrite=True)
    after = every_file(packed.folder)
    assert {name: after[name] for name in before} == before


def test_overwrite_replaces_all_old_shards(packed):
    again = write_shards(make_samples(3), packed.folder, NAMES, overwrite=True)
    assert [p.name for p in sorted(packed.folder.glob("*.tar"))] == ["data-000000.tar"]
    assert again.num_samples == 3


def test_taken_folder_is_refused(packed, tmp_path):
    with pytest.raises(UserError, match=r"out already holds a packed data set; --overwrite"):
        write_shards(make_samples(3), packed.folder, NAMES)
    (packed.folder / "precious.tar").touch()
    with pytest.raises(UserError, match=r"holds precious.tar"):
        write_shards(make_samples(3), packed.folder, NAMES, overwrite=True)
    orphans = tmp_path / "orphans"
    orphans.mkdir()
    (orphans / "data-000000.tar").touch()
    with pytest.raises(UserError, match="data shards without an index"):
        write_shards(make_samples(3), orphans, NAMES)


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
        expected = f"data.train: the index of {folder} is broken (it has version 99, this code reads 1); make"
    else:
        head.write_text("{")
        expected = f"data.train: the index of {folder} is broken ("
    with pytest.raises(UserError) as caught:
        open_index(folder, "data.train")
    assert str(caught.value).startswith(expected)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("column", ["offset", "length", "label"])
def test_open_index_refuses_a_column_of_another_data_set(packed, column):
    np.save(packed.folder / "index" / f"{column}.npy", np.zeros(9, dtype=shards.ARRAYS[column]))
    with pytest.raises(UserError, match=f"{column}.npy is int"):
        open_index(packed.folder, "data.train")


def test_open_index_never_unpickles(packed):
    np.save(packed.folder / "index" / "label.npy", np.array([print] * 10, dtype=object), allow_pickle=True)
    with pytest.raises(UserError, match="is broken"):
        open_index(packed.folder, "data.train")


def test_shard_that_shrinks_while_open_is_a_short_read(packed):
    os.truncate(packed.folder / "data-000002.tar", packed.locate(8)[1] + 10)
    index = packed
    with pytest.raises(
        UserError, match=r"shard data-000002.tar, sample 000000008.png: cannot read: 10 of \d+ bytes"
    ):
        index.read(8)


def test_foreign_shards_are_indexed_whatever_their_names(tmp_path):
    long_name = "../" * 40 + "very/" * 30 + "image.JPEG"
    write_tar(
        tmp_path / "b.tar",
        [("x/000.cls", b" 7\n"), ("x/000.txt", b"hello"), ("x/000.png", png(0)), ("x/README", b"")],
    )
    write_tar(
        tmp_path / "a.tar",
        [
            ("/etc/passwd.png", png(1)),
            ("/etc/._passwd.cls", b"not ours"),
            ("/etc/passwd.cls", b"0"),
            (long_name, png(2)),
            (long_name.replace("JPEG", "cls"), b"3"),
        ],
    )
    index = build_index(tmp_path)
    assert [(shard.name, shard.n) for shard in index.shards] == [("a.tar", 2), ("b.tar", 1)]
    assert index.labels_N.tolist() == [0, 3, 7]
    assert index.num_classes == 8
    assert index.class_names == ()
    assert [index.read(i) for i in range(3)] == [png(1), png(2), png(0)]
    assert index.class_statistics["empty"] == 5


def test_indexing_again_keeps_class_names_and_fingerprint(packed):
    again = build_index(packed.folder)
    assert again.class_names == packed.class_names
    assert again.fingerprint == packed.fingerprint


def test_shard_cut_anywhere_is_refused_by_name(tmp_path):
    whole = tmp_path / "whole"
    write_shards(make_samples(3), whole, NAMES)
    content = (whole / "data-000000.tar").read_bytes()
    end = content.rstrip(b"\0")
    last_block = -(-len(end) // 512) * 512
    for size in [0, 100, *range(512, last_block + 1024, 256)]:
        folder = tmp_path / str(size)
        folder.mkdir()
        (folder / "cut.tar").write_bytes(content[:size])
        with pytest.raises(UserError, match=r"cut\.tar: ") as caught:
            build_index(folder)
        assert "\n" not in str(caught.value)
    (folder / "cut.tar").write_bytes(content[: last_block + 1024])
    assert build_index(folder).num_samples == 3


def test_broken_header_in_the_middle_is_refused(packed):
    path = packed.folder / "data-000000.tar"
    content = bytearray(path.read_bytes())
    at = content.index(b"000000002.cls")
    content[at] = 0xFF
    path.write_bytes(content)
    (packed.folder / "index" / "index.json").unlink()
    with pytest.raises(
        UserError, match=rf"data-000000.tar: broken header, or another tar glued on, at byte {at}"
    ):
        build_index(packed.folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.png", b"x")], "sample a has no cls member"),
        ([("a.cls", b"1"), ("b.png", b"x"), ("b.cls", b"1")], "sample a has no image member"),
        ([("a.png", b"x"), ("a.jpg", b"x"), ("a.cls", b"1")], "sample a has no cls member"),
        ([("a.png", b"x"), ("a.cls", b"-1")], "label must be an integer from 0 to 2147483647, it is '-1'"),
        ([("a.png", b"x"), ("a.cls", b"1.0")], "it is '1.0'"),
        ([("a.png", b"x"), ("a.cls", b"2147483648")], "it is '2147483648'"),
        ([("a.png", b""), ("a.cls", b"1")], "sparse, empty or above"),
        ([("a.txt", b"x")], "hold no samples"),
    ],
)
def test_samples_that_are_not_image_and_label_are_refused_by_name(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as caught:
        build_index(tmp_path)
    assert message in str(caught.value)
    assert not shards.is_packed(tmp_path)


def test_folders_without_shards_and_labels_without_names_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.tar file"):
        build_index(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        build_index(tmp_path / "nowhere")
    with pytest.raises(UserError, match="hold no samples"):
        write_shards([], tmp_path / "empty", NAMES)
    with pytest.raises(UserError, match="label 3 has no name; there are 3 class names"):
        write_shards([(png(0), "png", 3)], tmp_path / "label", NAMES)


def test_full_disk_is_reported_in_one_line(tmp_path, monkeypatch):
    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="out: cannot write data shards: No space left on device"):
        write_shards(make_samples(2), tmp_path / "out", NAMES)
    assert not shards.is_packed(tmp_path / "out")
