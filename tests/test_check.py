import json
import re

import numpy as np
import pytest
from test_shards import make_samples, png, write_tar

from trainer.check import check
from trainer.errors import UserError
from trainer.index import Index
from trainer.jobs import Jobs
from trainer.shards import build_index, write_shards


@pytest.fixture
def packed(tmp_path) -> Index:
    return write_shards(make_samples(10), tmp_path / "out", ["ant", "bee"], samples_per_shard=4)


def problems(packed: Index) -> list[str]:
    return check(packed.folder).problems


def change(packed: Index, shard: int, old: bytes, new: bytes) -> None:
    path = packed.folder / packed.shards[shard].name
    content = path.read_bytes()
    assert content.count(old) == 1
    path.write_bytes(content.replace(old, new))


def change_index(packed: Index, **fields) -> None:
    path = packed.folder / "index" / "index.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def test_a_whole_data_set_has_no_problems_in_any_number_of_processes(packed):
    told = []
    for processes in (1, 2):
        assert check(packed.folder, Jobs(processes, told.append)).problems == []
    assert sum(told) == 20


def test_an_image_that_does_not_decode_is_named(packed):
    write_tar(
        packed.folder / "x.tar", [("a.png", png(0)[:40]), ("a.cls", b"1"), ("b.png", b"no"), ("b.cls", b"0")]
    )
    packed = build_index(packed.folder)
    cut, other = problems(packed)
    assert re.fullmatch(r"x\.tar: sample a: cannot decode: .+", cut)
    assert other == "x.tar: sample b: cannot decode: not one of PNG, JPEG, WEBP, BMP"


def test_changed_bytes_are_found_by_their_hash(packed):
    change(packed, 1, png(5), png(5)[:-1] + b"?")
    assert problems(packed)[0] == "data-000001.tar: its SHA-256 is not that of its index"


def test_shards_that_are_missing_cut_or_too_many_are_named(packed):
    path = packed.folder / "data-000001.tar"
    whole = path.read_bytes()
    path.write_bytes(whole[:1024])
    first, *_, last = problems(packed)
    assert first == f"data-000001.tar: 1024 bytes, its index says {len(whole)}"
    assert "data-000001.tar: truncated" in last or "has no" in last
    path.rename(packed.folder / "other.tar")
    assert problems(packed) == ["data-000001.tar: missing", "other.tar: not in the index"]


def test_an_index_that_says_otherwise_is_found_out(packed):
    change_index(packed, fingerprint="0" * 64, class_statistics={"min": 1, "mean": 5.0, "max": 5, "empty": 0})
    labels = np.array(packed.labels_N)
    labels[6] ^= 1
    path = packed.folder / "index" / "label.npy"
    path.unlink()
    np.save(path, labels, allow_pickle=False)
    offset, length = int(packed.offsets_N[6]), int(packed.lengths_N[6])
    assert problems(packed) == [
        f"data-000001.tar: sample 2 has offset, length, label [{offset}, {length}, 0],"
        f" its index says [{offset}, {length}, 1]",
        "index.json: its fingerprint is not that of its shards and labels",
        "index.json: its class statistics are not those of its labels",
    ]


def test_keys_that_occur_twice_and_pairs_without_images_are_found(packed):
    (packed.folder / "copy.tar").write_bytes((packed.folder / "data-000000.tar").read_bytes())
    packed = build_index(packed.folder)
    (packed.folder / "pairs.csv").write_text("key1,key2,same,fold\n000000001,000000099,1,0\n")
    assert problems(packed) == [
        "4 keys occur twice",
        "pairs.csv: no sample '000000099', which a pair names",
    ]
    (packed.folder / "pairs.csv").write_bytes(b"key1,key2,same,fold\n\xff")
    assert problems(packed)[1:] == ["pairs.csv: not UTF-8 at byte 20"]
    (packed.folder / "pairs.csv").write_bytes(b"key1,key2,same,fold\n" + b"0" * 200_000)
    assert problems(packed)[1:] == ["pairs.csv: field larger than field limit (131072)"]


def test_a_folder_without_an_index_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"FOLDER: .* has no index"):
        check(tmp_path)
