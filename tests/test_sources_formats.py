"""Each family of data sets, small and whole: classes, pixels, protocol, and what is said of broken ones."""

import gzip
import io
import json
import pickle
import zipfile
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hostile import fuzz, message_of
from hypothesis import given
from hypothesis import strategies as st
from launching import OMNIGLOT
from PIL import Image
from test_shards import png, write_tar

from trainer.errors import UserError
from trainer.sources import (
    cifar,
    csv_sets,
    lfw,
    market1501,
    mnist,
    orl,
    parquet,
    pipa,
    tar_samples,
    verification_bin,
)
from trainer.sources.mnist import read_idx
from trainer.sources.pictures import png_bytes

ORL = OMNIGLOT.with_name("orl_faces.zip")
CIFAR_JPEG = OMNIGLOT.with_name("cifar10_jpeg.zip")


def pixels_of(content: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(content)))


def put(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def jpeg(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", size, shade).save(buffer, "JPEG")
    return buffer.getvalue()


# CSV


def test_csv_rows_become_samples_of_the_set_that_split_names(tmp_path):
    for i in range(4):
        put(tmp_path / "images" / f"{i},x.png", png(i))
    lines = [
        "path,label,split,note",
        *(f'"images/{i},x.png",{"b" if i else "a"},{"test" if i > 2 else "train"},z' for i in range(4)),
    ]
    table = put(tmp_path / "list.csv", b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    sets = csv_sets(table)
    assert sets.keys() == {"train", "test"}
    assert list(sets["train"]) == [(png(0), "png", "a"), (png(1), "png", "b"), (png(2), "png", "b")]
    assert list(sets["test"]) == [(png(3), "png", "b")]
    moved = put(tmp_path / "elsewhere" / "list.csv", table.read_bytes())
    assert list(csv_sets(moved, root=tmp_path)["test"]) == list(sets["test"])


def test_csv_without_split_is_one_set_and_numbers_are_sorted_by_value(tmp_path):
    put(tmp_path / "0.png", png(0))
    source = csv_sets(put(tmp_path / "a.csv", b"label,path\n10,0.png\n9,0.png\n"))[""]
    assert source.class_names == ["9", "10"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column label in its first line"),
        ("path\nx.png\n", "no column label in its first line"),
        ("path,label\n", "holds no rows"),
        ("path,label\n0.png,\n", "a.csv:2: path or label is empty"),
        ("path,label\n0.png\n", "a.csv:2: path or label is empty"),
        ("path,label\n1.png,a\n", "a.csv:2: .*1.png does not exist"),
        ("path,label\n" + "x" * 5000 + ".png,a\n", r"a.csv:2: 'x{40}'\.\.\.: File name too long"),
        ("path,label\n/etc/passwd,a\n", "a.csv:2: 'passwd' is not an image"),
        ("path,label,split\n0.png,a,../x\n", r"a.csv:2: split '\.\./x' must be letters"),
        ('path,label\n"0.png,a\n', r"a.csv:\d: unexpected end"),
        ("path,label\n\xff", "a.csv: not UTF-8 at byte 11"),
    ],
)
def test_csv_errors_name_the_line(tmp_path, text, message):
    put(tmp_path / "0.png", png(0))
    with pytest.raises(UserError, match=message):
        csv_sets(put(tmp_path / "a.csv", text.encode("latin-1")))


@fuzz(40)
@given(st.one_of(st.binary(max_size=60), st.text('path,lbe0.ng"\r\n\0').map(str.encode)))
def test_any_csv_gives_sets_or_an_error_of_the_user(tmp_path, content):
    table = put(tmp_path / "a.csv", b"path,label\n" + content)
    assert "\n" not in message_of(lambda: csv_sets(table))


# idx


def idx(array: np.ndarray) -> bytes:
    shape = np.array(array.shape, dtype=">u4").tobytes()
    return bytes([0, 0, 8, array.ndim]) + shape + array.tobytes()


def write_mnist(folder: Path, names: tuple[str, str], count: int, seed: int, compressed: bool) -> np.ndarray:
    images = np.random.RandomState(seed).randint(0, 256, (count, 5, 4), dtype=np.uint8)
    labels = np.arange(count, dtype=np.uint8) % 3
    for name, array in zip(names, (images, labels), strict=True):
        content = idx(array)
        put(folder / (name + ".gz" * compressed), gzip.compress(content) if compressed else content)
    return images


@pytest.mark.parametrize("compressed", [False, True])
def test_mnist_is_read_from_raw_and_gz_files(tmp_path, compressed):
    train = write_mnist(tmp_path, ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"), 7, 0, compressed)
    test = write_mnist(tmp_path, ("t10k-images.idx3-ubyte", "t10k-labels.idx1-ubyte"), 4, 1, compressed)
    for split, images in (("train", train), ("test", test)):
        source = mnist(tmp_path, split)
        assert list(source.classes) == [str(i % 3) for i in range(len(images))]
        assert np.array_equal([pixels_of(content) for content, _, _ in source], images)


def test_emnist_is_turned_upright_and_chosen_by_its_prefix(tmp_path):
    letters = ("emnist-letters-train-images-idx3-ubyte", "emnist-letters-train-labels-idx1-ubyte")
    images = write_mnist(tmp_path, letters, 3, 0, True)
    assert np.array_equal(pixels_of(mnist(tmp_path, "train").read(1)[0]), images[1].T)
    write_mnist(tmp_path, tuple(name.replace("letters", "digits") for name in letters), 5, 1, True)
    with pytest.raises(UserError, match="holds several: --prefix emnist-digits- or emnist-letters-"):
        mnist(tmp_path, "train")
    assert len(mnist(tmp_path, "train", "emnist-letters")) == 3
    with pytest.raises(UserError, match=r"no emnist-letters-t10k-images"):
        mnist(tmp_path, "test", "emnist-letters")
    with pytest.raises(UserError, match="holds none"):
        mnist(tmp_path / "nowhere", "train")
    put(tmp_path / (letters[0] + ".gz"), idx(np.empty((3, 0, 28), dtype=np.uint8)))
    with pytest.raises(UserError, match=r"letters-train-images\S+: images of 0 x 28 pixels"):
        mnist(tmp_path, "train", "emnist-letters")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        bytes([0, 0, 13, 1, 0, 0, 0, 1]) + b"abcd",  # floats
        bytes([0, 0, 8, 3]) + bytes(12),  # other dimensions
        bytes([0, 0, 8, 1, 255, 255, 255, 255]) + b"short",  # 4 GB claimed
        bytes([0, 0, 8, 1, 0, 0, 0, 2]) + b"abc",
        gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 2]) + b"ab")[:-6],
        gzip.compress(bytes([0, 0, 8, 1, 0, 0, 0, 1]) + bytes(1 << 24)),  # a bomb
    ],
    # Names of our own: a gzip header holds the time, and workers must agree on the tests' names.
    ids=["empty", "floats", "dimensions", "claims-4-GB", "too-long", "cut-gzip", "bomb"],
)
def test_broken_idx_is_refused(tmp_path, content):
    with pytest.raises(UserError, match="not an idx file of 1 dimensions"):
        read_idx(put(tmp_path / "a", content), 1)


@fuzz(40)
@given(st.data())
def test_any_idx_gives_an_array_or_an_error_of_the_user(tmp_path, data):
    content = data.draw(st.sampled_from([b"", b"\0\0\x08\x01", b"\0\0\x08\x01\0\0\0", b"\x1f\x8b"]))
    content += data.draw(st.binary(max_size=30))
    path = put(tmp_path / "a", gzip.compress(content) if data.draw(st.booleans()) else content)
    assert "\n" not in message_of(lambda: read_idx(path, 1))


# CIFAR


@pytest.fixture
def planes():
    """Images as CIFAR keeps them: rows of 3072 bytes, all of red first."""
    return np.random.RandomState(0).randint(0, 256, (4, 3072), dtype=np.uint8)


def expected(planes: np.ndarray) -> np.ndarray:
    return np.stack(
        [np.dstack([row[:1024], row[1024:2048], row[2048:]]).reshape(32, 32, 3) for row in planes]
    )


def assert_is(source, planes: np.ndarray, classes: list[str]) -> None:
    assert list(source.classes) == classes
    assert np.array_equal([pixels_of(content) for content, _, _ in source], expected(planes))


def test_cifar_10_python_and_binary(tmp_path, planes):
    python, binary = tmp_path / "cifar-10-batches-py", tmp_path / "bin"
    put(python / "batches.meta", pickle.dumps({b"label_names": [b"airplane", b"cat"]}))
    put(binary / "batches.meta.txt", b"airplane\ncat\n\n")
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        put(python / name, pickle.dumps({b"data": planes, b"labels": [0, 1, 1, 0]}, protocol=2))
        rows = b"".join(
            bytes([label]) + row.tobytes() for label, row in zip([0, 1, 1, 0], planes, strict=True)
        )
        put(binary / f"{name}.bin", rows)
    names = ["airplane", "cat", "cat", "airplane"]
    for folder in (python, binary, tmp_path):
        assert_is(cifar(folder, "test"), planes, names)
        assert_is(cifar(folder, "train"), np.tile(planes, (5, 1)), names * 5)
    (binary / "test_batch.bin").write_bytes(b"abc")
    with pytest.raises(UserError, match=r"test_batch\.bin: 3 bytes are not rows of 3073"):
        cifar(binary, "test")
    put(python / "test_batch", pickle.dumps({b"data": planes, b"labels": [0, 1, 1, 7]}))
    with pytest.raises(UserError, match=r"test_batch: labels outside 0\.\.1"):
        cifar(python, "test")
    put(python / "test_batch", pickle.dumps({b"data": planes[:, :9], b"labels": [0, 1, 1, 7]}))
    with pytest.raises(UserError, match=r"data is uint8\[4, 9\], not uint8\[4, 3072\]"):
        cifar(python, "test")


def test_cifar_100_has_its_fine_classes(tmp_path, planes):
    put(
        tmp_path / "p" / "meta",
        pickle.dumps({"fine_label_names": ["ant", "bee"], "coarse_label_names": ["x"]}),
    )
    put(
        tmp_path / "p" / "train",
        pickle.dumps({b"data": planes, b"fine_labels": [0, 1, 1, 1], b"coarse_labels": [0] * 4}),
    )
    put(tmp_path / "b" / "fine_label_names.txt", b"ant\nbee\n")
    rows = [bytes([0, label]) + row.tobytes() for label, row in zip([0, 1, 1, 1], planes, strict=True)]
    put(tmp_path / "b" / "train.bin", b"".join(rows))
    for folder in ("p", "b"):
        assert_is(cifar(tmp_path / folder, "train"), planes, ["ant", "bee", "bee", "bee"])


def test_cifar_10_as_sheets_of_one_image_a_row(tmp_path, planes):
    for name in [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"]:
        put(
            tmp_path / f"{name}.png",
            png_bytes(Image.fromarray(planes.reshape(4, 3, 1024).transpose(0, 2, 1))),
        )
    put(tmp_path / "test_lables.json", b"[0, 3, 3, 9]")
    put(tmp_path / "train_lables.json", json.dumps([1, 2, 3, 4] * 5).encode())
    assert_is(cifar(tmp_path, "test"), planes, ["airplane", "cat", "cat", "truck"])
    assert_is(cifar(tmp_path, "train"), np.tile(planes, (5, 1)), ["automobile", "bird", "cat", "deer"] * 5)
    for labels, message in [
        (b"[0, 3, 3]", "not a list of 4 labels, one for each image"),
        (b"{}", "not a list of 4 labels, one for each image"),
        (b"[0, 3, 3", "not JSON"),
        (b"[0, 3, 3, -1]", "label -1 is not a small integer"),
        (b"[0, 3, 3, 10]", "labels outside 0..9, the classes that have names"),
    ]:
        put(tmp_path / "test_lables.json", labels)
        assert message in message_of(lambda: cifar(tmp_path, "test"))
    put(tmp_path / "test_batch.png", png_bytes(Image.new("RGB", (1000, 4))))
    assert "rows of 1000 pixels are not images" in message_of(lambda: cifar(tmp_path, "test"))
    put(tmp_path / "test_batch.png", b"\x89PNG")
    assert "test_batch.png: cannot decode" in message_of(lambda: cifar(tmp_path, "test"))


def test_cifar_as_images_in_a_zip(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        for name in ("train/cat/0.jpg", "train/dog/0.jpg", "test/cat/1.jpg", "__MACOSX/train/._x.jpg"):
            archive.writestr(name, jpeg(len(name)))
    assert [name for _, _, name in cifar(tmp_path / "c.zip", "train")] == ["cat", "dog"]
    assert list(cifar(tmp_path / "c.zip", "test")) == [(jpeg(14), "jpg", "cat")]
    with pytest.raises(UserError, match="is not CIFAR"):
        cifar(tmp_path, "train")


@pytest.mark.skipif(not CIFAR_JPEG.is_file(), reason="needs cifar10_jpeg.zip beside omniglot.zip")
def test_real_cifar_jpegs_are_found():
    train, test = cifar(CIFAR_JPEG, "train"), cifar(CIFAR_JPEG, "test")
    assert Counter(train.classes) == dict.fromkeys(train.class_names, 5000)
    assert Counter(test.classes) == dict.fromkeys(train.class_names, 1000)
    assert pixels_of(test.read(9)[0]).shape == (32, 32, 3)


def test_a_zip_that_claims_a_gigabyte_is_not_unpacked(tmp_path):
    with zipfile.ZipFile(tmp_path / "c.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/cat/0.jpg", bytes(1 << 20))
    content = (tmp_path / "c.zip").read_bytes()
    size = (1 << 20).to_bytes(4, "little")
    (tmp_path / "c.zip").write_bytes(content.replace(size, (1 << 30).to_bytes(4, "little")))
    with pytest.raises(UserError, match=r"cannot read train/cat/0\.jpg: above 256 MiB unpacked"):
        list(cifar(tmp_path / "c.zip", "train"))


# Faces and people


@pytest.mark.skipif(not ORL.is_file(), reason="needs orl_faces.zip beside omniglot.zip")
def test_orl_has_thirty_people_for_training_and_ten_for_the_test():
    train, test = orl(ORL, "train"), orl(ORL, "test")
    assert Counter(train.classes) == dict.fromkeys((f"s{i}" for i in range(1, 31)), 10)
    assert Counter(test.classes) == dict.fromkeys((f"s{i}" for i in range(31, 41)), 10)
    content, extension = test.read(0)
    assert (extension, pixels_of(content).shape) == ("png", (112, 92))
    with pytest.raises(UserError, match="is not the ORL faces"):
        orl(OMNIGLOT, "train")


def test_verification_bin_keeps_each_image_once_and_names_pairs_by_place(tmp_path):
    images = [jpeg(i * 10) for i in range(5)]
    listed = [images[k] for k in (0, 1, 0, 2, 3, 4)] * 7
    as_arrays = [np.frombuffer(image, np.uint8) for image in listed]
    same = [True, False, True] * 7
    for content in ((listed, same), [as_arrays, np.array(same)]):
        source = verification_bin(put(tmp_path / "lfw.bin", pickle.dumps(content)))
        assert [image for image, _, _ in source] == images
        assert [pair[:3] for pair in source.pairs] == [(0, 1, True), (0, 2, False), (3, 4, True)] * 7
        assert Counter(pair[3] for pair in source.pairs) == {0: 3} | dict.fromkeys(range(1, 10), 2)


@pytest.mark.parametrize(
    "content",
    [[], (1, 2), ([b"a"], [True]), ([b"a", 1], [True]), ([b"a", b"b"], [7]), ([b"a", b"b"], [[]]), ([], []),
     ([np.arange(3), b"a"], [True])],
)  # fmt: skip
def test_broken_verification_bin_is_refused(tmp_path, content):
    with pytest.raises(UserError, match=r"a\.bin: "):
        verification_bin(put(tmp_path / "a.bin", pickle.dumps(content)))


def test_lfw_pairs_name_images_and_folds(tmp_path):
    for name, i in (("Ann_Lee", 1), ("Ann_Lee", 2), ("Bo", 1), ("Cy", 1), ("Cy", 12)):
        put(tmp_path / "lfw" / name / f"{name}_{i:04d}.jpg", jpeg(i))
    text = "2\t1\nAnn_Lee\t1\t2\nAnn_Lee\t2\tBo\t1\nCy\t12\t1\nBo\t1\tCy\t12\n"
    pairs = put(tmp_path / "pairs.txt", text.encode())
    source = lfw(tmp_path / "lfw", pairs)
    assert list(source.classes) == ["Ann_Lee", "Ann_Lee", "Bo", "Cy", "Cy"]
    assert source.pairs == [(0, 1, True, 0), (1, 2, False, 0), (4, 3, True, 1), (2, 4, False, 1)]
    for wrong, message in {
        text.replace("2\t1\nAnn", "3\t1\nAnn"): "4 pairs are not 3 folds of 2 x 1",
        text.replace("Bo\t1\nCy", "Bo\t7\nCy"): "pair 2: .*lfw has no image Bo_0007",
        text.replace("Cy\t12\t1", "Cy\t12\tx"): "pair 3: 'Cy 12 x' is not NAME i j",
        "": "it must begin with FOLDS<tab>PAIRS",
    }.items():
        pairs.write_text(wrong)
        with pytest.raises(UserError, match=message):
            lfw(tmp_path / "lfw", pairs)
    put(tmp_path / "lfw" / "Di" / "Bo_0001.png", png(1))
    with pytest.raises(UserError, match=r"lfw: 'Bo/Bo_0001.jpg' and 'Di/Bo_0001.png' have the same name"):
        lfw(tmp_path / "lfw", pairs)


def test_market_keeps_junk_and_distractors_and_says_person_and_camera(tmp_path):
    names = {
        "bounding_box_train": ["0002_c1s1_000451_03.jpg", "0007_c6s4_1.jpg"],
        "bounding_box_test": ["-1_c1s1_000401_03.jpg", "0000_c3s2_1.jpg", "0001_c2s1_1.jpg", "Thumbs.db"],
        "query": ["0001_c1s1_001051_00.jpg"],
    }
    with zipfile.ZipFile(tmp_path / "m.zip", "w") as archive:
        for folder, images in names.items():
            for name in images:
                archive.writestr(f"Market-1501-v15/{folder}/{name}", jpeg(3))
    gallery = market1501(tmp_path / "m.zip", "gallery")
    assert gallery.classes == ["-1", "0000", "0001"]
    assert gallery.skipped == 1
    assert [gallery.notes(i) for i in range(3)] == [
        {"person": -1, "camera": 1},
        {"person": 0, "camera": 3},
        {"person": 1, "camera": 2},
    ]
    query, train = market1501(tmp_path / "m.zip", "query"), market1501(tmp_path / "m.zip", "train")
    assert (query.classes, train.classes) == (["0001"], ["0002", "0007"])
    put(tmp_path / "m" / "query" / "nobody.jpg", jpeg(1))
    with pytest.raises(UserError, match=r"'query/nobody\.jpg' is not PERSON_cCAMERA"):
        market1501(tmp_path / "m", "query")
    with pytest.raises(UserError, match="no images in bounding_box_test"):
        market1501(tmp_path / "m", "gallery")


def test_pipa_cuts_people_out_and_says_on_which_side_of_a_split_they_are(tmp_path):
    photo = np.zeros((60, 40, 3), dtype=np.uint8)
    photo[10:20, 12:20] = 255
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "PNG")
    put(tmp_path / "test" / "77_88.png", buffer.getvalue())
    put(tmp_path / "train" / "1_2.jpg", jpeg(1, (50, 50)))
    put(tmp_path / "all_data.txt", b"77 88 12 10 8 10 901 3\n77 88 0 0 5 5 902 3\n1 2 3 4 5 6 900 1\n")
    put(tmp_path / "split_test_day.txt", b"77 88 12 10 8 10 901 3 1\n")
    source = pipa(tmp_path, "test")
    assert source.classes == ["901", "902"]
    head = pixels_of(source.read(0)[0])
    assert head.shape == (10, 8, 3)
    assert head.min() > 200
    assert source.notes(0) == {"photoset": "77", "photo": "88", "head": [12, 10, 8, 10], "day": 1}
    assert "day" not in source.notes(1)
    assert pixels_of(pipa(tmp_path, "test", "upper").read(0)[0]).shape == (30, 16, 3)
    assert pixels_of(pipa(tmp_path, "test", "body").read(0)[0]).shape == (50, 16, 3)  # clipped to the photo
    assert pipa(tmp_path, "train").classes == ["900"]
    with pytest.raises(UserError, match=r"no line of subset 2 \(val\)"):
        pipa(tmp_path, "val")
    put(tmp_path / "all_data.txt", b"77 88 12 10 8 x 901 3\n")
    with pytest.raises(UserError, match=r"all_data\.txt: row 1: 8 columns are expected"):
        pipa(tmp_path, "test")
    put(tmp_path / "all_data.txt", b"77 88 100 10 8 8 901 3\n7 8 1 1 8 8 1 1\n")
    with pytest.raises(UserError, match=r"cannot cut out: .* lies outside of the photo of 40 x 60 pixels"):
        pipa(tmp_path, "test").read(0)
    with pytest.raises(UserError, match=r"no photo 7_8\.jpg"):
        pipa(tmp_path, "train")


# Parquet and tars


def test_parquet_holds_bytes_structs_or_paths_and_names_of_classes(tmp_path):
    put(tmp_path / "x.png", png(9))
    labels = pyarrow.array([1, 0, 1])
    features = {"info": {"features": {"label": {"_type": "ClassLabel", "names": ["ant", "bee"]}}}}
    tables = {
        "bytes": pyarrow.array([png(0), jpeg(1), png(2)]),
        "structs": pyarrow.array([{"bytes": image, "path": "q"} for image in (png(0), jpeg(1), png(2))]),
        "paths": pyarrow.array(["x.png"] * 3),
    }
    for name, images in tables.items():
        table = pyarrow.table({"image": images, "label": labels, "other": ["a", "b", "c"]})
        table = table.replace_schema_metadata({"huggingface": json.dumps(features)})
        pyarrow.parquet.write_table(table, tmp_path / f"{name}.parquet")
        source = parquet(tmp_path / f"{name}.parquet", "image", "label")
        assert source.classes == ["bee", "ant", "bee"]
        expected = [png(9)] * 3 if name == "paths" else [png(0), jpeg(1), png(2)]
        assert [image for image, _, _ in source] == expected
        assert source.read(1)[1] == ("png" if name == "paths" else "jpg")
    assert len(parquet(tmp_path, "image", "label")) == 9


def test_parquet_errors_name_the_file(tmp_path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"image": [b"x"], "label": [-1], "name": ["n"]}), path)
    with pytest.raises(UserError, match=r"a\.parquet: no column picture; it has image, label, name"):
        parquet(path, "picture", "label")
    with pytest.raises(UserError, match="row 0: label -1 is neither a name nor the number of a class"):
        parquet(path, "image", "label")
    with pytest.raises(UserError, match=r"row 0: cannot decode: not an image"):
        parquet(path, "image", "name").read(0)
    for content in (b"", b"PAR1" + bytes(20) + b"PAR1", path.read_bytes()[:-40]):
        put(path, content)
        with pytest.raises(UserError, match=r"a\.parquet: cannot read as Parquet"):
            parquet(path, "image", "label")
    with pytest.raises(UserError, match="cannot read"):
        parquet(tmp_path / "nowhere.parquet", "image", "label")


def test_foreign_tars_are_read_with_their_json(tmp_path):
    write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.cls", b"7"), ("x.json", b'{"who": "me"}')])
    write_tar(tmp_path / "b.tar", [("y.jpeg", jpeg(1)), ("y.cls", b"10")])
    source = tar_samples(tmp_path)
    assert list(source) == [(png(0), "png", "7"), (jpeg(1), "jpeg", "10")]
    assert source.class_names == ["7", "10"]
    assert [source.notes(i) for i in (0, 1)] == [{"who": "me"}, {}]
    assert tar_samples(tmp_path / "b.tar").notes is None
    write_tar(tmp_path / "a.tar", [("x.png", png(0)), ("x.cls", b"7"), ("x.json", b"[" * 100_000)])
    with pytest.raises(UserError, match=r"a\.tar: sample 'x': its json is broken"):
        tar_samples(tmp_path / "a.tar").notes(0)
