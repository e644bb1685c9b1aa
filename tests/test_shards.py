import gc
import hashlib
import io
import json
import os
import tarfile

import numpy as np
import pytest
import webdataset
from PIL import Image

from trainer.errors import UserError
from trainer.index import VERSION, is_packed
from trainer.shards import build_index, write_shards

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


def test_what_was_written_is_read_back(packed):
    assert packed.num_samples == 10
    assert packed.num_classes == 3
    assert packed.class_names == ("ant", "bee", "cat")
    assert packed.labels_N.tolist() == [0, 1] * 5
    assert [packed.read(i) for i in range(10)] == [png(i) for i in range(10)]
    assert packed.class_statistics == {"min": 0, "mean": 10 / 3, "max": 5, "empty": 1}


def test_index_json_says_what_the_shards_are(packed):
    head = json.loads((packed.folder / "index" / "index.json").read_text())
    assert head["version"] == VERSION
    assert head["num_samples"] == 10
    for shard in head["shards"]:
        content = (packed.folder / shard["name"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())


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


def test_interrupted_pack_leaves_nothing_that_looks_complete(tmp_path):
    def broken():
        yield from make_samples(5)
        raise KeyboardInterrupt

    out = tmp_path / "out"
    with pytest.raises(KeyboardInterrupt):
        write_shards(broken(), out, NAMES, samples_per_shard=2)
    assert not is_packed(out)
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


def test_indexing_again_after_a_shard_has_changed_keeps_class_names(packed, tmp_path):
    other = write_shards(make_samples(12), tmp_path / "other", NAMES)
    (other.folder / "data-000000.tar").replace(packed.folder / "data-000001.tar")
    again = build_index(packed.folder)
    assert (again.num_samples, again.class_names) == (18, packed.class_names)
    assert again.read(4) == png(0)


def test_broken_index_is_not_replaced_because_its_class_names_would_be_lost(packed):
    (packed.folder / "index" / "index.json").write_text("{")
    with pytest.raises(UserError, match=rf"is broken \(.*\); delete {packed.folder}/index and make it again"):
        build_index(packed.folder)


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
        ([("a.png", b""), ("a.cls", b"1")], "image is empty or above"),
        ([("a.txt", b"x")], "hold no samples"),
    ],
)
def test_samples_that_are_not_image_and_label_are_refused_by_name(tmp_path, members, message):
    write_tar(tmp_path / "x.tar", members)
    with pytest.raises(UserError) as caught:
        build_index(tmp_path)
    assert message in str(caught.value)
    assert not is_packed(tmp_path)


@pytest.mark.parametrize("name", ["-x.tar", ".x.tar", "a\\.tar", "a\n.tar"])
def test_shards_that_an_index_cannot_name_are_refused_before_it_is_written(tmp_path, name):
    write_tar(tmp_path / name, [("a.png", b"x"), ("a.cls", b"1")])
    with pytest.raises(UserError) as caught:
        build_index(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path}: {name!a} begins with - or .")
    assert not (tmp_path / "index").exists()


def test_a_folder_called_like_a_shard_is_refused(tmp_path):
    (tmp_path / "x.tar").mkdir()
    with pytest.raises(UserError, match=r"x\.tar: cannot read: Is a directory"):
        build_index(tmp_path)


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
    assert not is_packed(tmp_path / "out")
