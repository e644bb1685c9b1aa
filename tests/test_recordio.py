import struct
from pathlib import Path

import numpy as np
import pytest
from hostile import fuzz, message_of
from hypothesis import given
from hypothesis import strategies as st
from test_shards import png

from trainer.errors import UserError
from trainer.recordio import MAGIC, RecordFile, whole_number
from trainer.sources import rec

MAGIC_BYTES = struct.pack("<I", MAGIC)


def content(image: bytes, *labels: float, flag: int | None = None) -> bytes:
    """A record's content, as MXNet packs it: one label in the header, or a flag and many behind it."""
    flag = flag if flag is not None else (len(labels) if len(labels) != 1 else 0)
    head = struct.pack("<IfQQ", flag, labels[0] if flag == 0 else 0.0, 7, 0)
    return head + (np.array(labels, dtype="<f4").tobytes() if flag else b"") + image


def framed(record: bytes) -> bytes:
    """Write as dmlc does: cut where the magic lies on a multiple of 4, and drop it there."""
    pieces, start = [], 0
    for at in range(0, len(record) - 3, 4):
        if record[at : at + 4] == MAGIC_BYTES:
            pieces.append(record[start:at])
            start = at + 4
    pieces.append(record[start:])
    kinds = [0] if len(pieces) == 1 else [1, *[2] * (len(pieces) - 2), 3]
    return b"".join(
        struct.pack("<II", MAGIC, kind << 29 | len(piece)) + piece + b"\0" * (-len(piece) % 4)
        for kind, piece in zip(kinds, pieces, strict=True)
    )


def write(path: Path, records: list[bytes], keys: list[int] | None = None) -> Path:
    offsets, rec_bytes = [], b""
    for record in records:
        offsets.append(len(rec_bytes))
        rec_bytes += framed(record)
    path.write_bytes(rec_bytes)
    lines = [f"{key}\t{offset}\n" for key, offset in zip(keys or range(len(records)), offsets, strict=True)]
    path.with_suffix(".idx").write_text("".join(lines))
    return path


def test_records_are_read_back_with_their_labels(tmp_path):
    records = [content(b"one", 3), content(b"", 5, 6), content(b"three!", 1, 2, 3), content(b"x", 9, flag=1)]
    file = RecordFile(write(tmp_path / "a.rec", records))
    assert [file.read(i) for i in range(4)] == [
        ((3.0,), b"one"),
        ((5.0, 6.0), b""),
        ((1.0, 2.0, 3.0), b"three!"),
        ((9.0,), b"x"),
    ]
    assert [file.labels(i) for i in range(4)] == [file.read(i).labels for i in range(4)]


def test_a_record_that_contains_the_magic_is_put_together_again(tmp_path):
    images = [MAGIC_BYTES * 3 + b"tail", b"ab12" + MAGIC_BYTES + b"cd", b"abc" + MAGIC_BYTES, MAGIC_BYTES]
    path = write(tmp_path / "a.rec", [content(image, 1.0) for image in images])
    assert [RecordFile(path).read(i).image for i in range(4)] == images


def test_identities_behind_the_images_are_not_images(tmp_path):
    people = [9, 2, 2, 10]
    images = [content(png(i), person, flag=1) for i, person in enumerate(people)]
    identities = [content(b"", 1, 2), content(b"", 2, 4), content(b"", 4, 5)]
    path = write(tmp_path / "train.rec", [content(b"", 5, 8), *images, *identities])
    source = rec(tmp_path)
    assert source.classes == ["9", "2", "2", "10"]
    assert source.class_names == ["2", "9", "10"]
    assert [source.read(i) for i in range(4)] == [(png(i), "png") for i in range(4)]
    assert list(source.files) == [path, path.with_suffix(".idx")]


def test_without_a_header_every_record_is_an_image_and_lines_may_come_in_any_order(tmp_path):
    path = write(tmp_path / "a.rec", [content(png(i), float(i)) for i in (2, 0, 1)], keys=[2, 0, 1])
    assert rec(path).classes == ["0", "1", "2"]
    assert rec(path).read(2) == (png(2), "png")


@pytest.mark.parametrize("label", [2.0**24, 2.0**24 + 2, -1.0, 0.5, float("nan"), float("inf")])
def test_labels_that_a_float_cannot_hold_exactly_are_refused(tmp_path, label):
    path = write(tmp_path / "a.rec", [content(png(0), 1.0), content(png(1), label)])
    with pytest.raises(
        UserError, match=r"a\.rec: record 1 at byte \d+: label .* not a whole number below 2\^24"
    ):
        rec(path)
    assert whole_number(2.0**24 - 1, "") == 16777215


def test_what_is_broken_is_named(tmp_path):
    path = write(tmp_path / "a.rec", [content(png(0), 1.0)])
    path.with_suffix(".idx").unlink()
    with pytest.raises(UserError, match=r"a\.idx: cannot read: No such file"):
        rec(path)
    for text, message in {
        "": "holds no lines",
        "0\t1\n": "no record begins at byte 1",
        "0\t99999\n": "truncated, or beyond the end",
        "0\t-4\n": "-4 is negative",
        "0 zero\n": "not lines of KEY<tab>OFFSET",
        "0\n": "not lines of KEY<tab>OFFSET",
        "0\t99999999999999999999\n": "not lines of KEY<tab>OFFSET",
    }.items():
        path.with_suffix(".idx").write_text(text)
        with pytest.raises(UserError, match=message):
            rec(path)
    write(path, [content(b"", 9, 12), content(png(0), 1.0)])
    with pytest.raises(UserError, match=r"images end before key 9, but the \.idx has 2 lines"):
        rec(path)
    write(path, [content(png(0), flag=1 << 20)])
    with pytest.raises(UserError, match="1048576 labels do not fit"):
        rec(path)


@fuzz(40)
@given(st.data())
def test_any_bytes_give_a_record_or_an_error_of_the_user(tmp_path, data):
    start = data.draw(
        st.sampled_from([b"", framed(content(png(0), 1, 2)), MAGIC_BYTES, MAGIC_BYTES + b"\xff" * 4])
    )
    whole = bytearray(start + data.draw(st.binary(max_size=80)))
    for at in data.draw(st.lists(st.integers(0, max(0, len(whole) - 1)), max_size=4)) if whole else ():
        whole[at] = data.draw(st.integers(0, 255))
    path = tmp_path / "a.rec"
    path.write_bytes(whole)
    index = st.one_of(st.just(b"0\t0\n"), st.binary(max_size=30))
    path.with_suffix(".idx").write_bytes(data.draw(index))
    assert "\n" not in message_of(lambda: list(rec(path)))
