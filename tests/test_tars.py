"""Hostile tars: any bytes give samples, or one line that names the tar. Good ones: test_shards.py."""

import io
import tarfile
import time
from pathlib import Path

import pytest
from hostile import fuzz, message_of
from hypothesis import given
from hypothesis import strategies as st
from test_shards import png, write_tar

from trainer.errors import UserError
from trainer.tars import read_tar, scan_tar

END = bytes(1024)


def header(name: str, size: int, kind: bytes = b"0") -> bytes:
    """A header block with any size, also those tarfile would not write."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[156:157] = kind
    if 0 <= size < 8**11:
        digits = b"%011o\0" % size
    else:
        digits = (b"\x80" if size > 0 else b"\xff") + size.to_bytes(11, "big", signed=size < 0)
    block[124:136] = digits
    block[148:156] = b"%06o\0 " % (sum(block[:148]) + 256 + sum(block[156:]))
    return bytes(block)


def member(name: str, content: bytes, kind: bytes = b"0") -> bytes:
    return header(name, len(content), kind) + content + bytes(-len(content) % 512)


def scan(path: Path, content: bytes) -> list:
    path.write_bytes(content)
    return list(scan_tar(path))


def test_json_is_found_and_other_members_are_not_looked_at(tmp_path):
    write_tar(
        tmp_path / "a.tar",
        [("a.json", b"{}"), ("a.png", png(0)), ("a.cls", b"1"), ("a.pyd", b"code"), ("b.cls", b"2"),
         ("b.pth", b"code"), ("b.jpg", b"x"), ("stats.json", b"[]")],
    )  # fmt: skip
    first, second = scan_tar(tmp_path / "a.tar")
    assert (first.key, first.extension, first.label, first.length) == ("a", "png", 1, len(png(0)))
    assert (first.json_length, second.json_offset, second.label) == (2, 0, 2)
    with (tmp_path / "a.tar").open("rb") as file:
        file.seek(first.json_offset)
        assert file.read(2) == b"{}"


@pytest.mark.parametrize("size", [-1, -512, -1536, -(2**62)])
def test_a_negative_size_does_not_go_backwards_for_ever(tmp_path, size):
    for kind in (b"0", b"x", b"L", b"S"):
        content = member("0.cls", b"1") + header("0.png", size, kind) + bytes(512) + END
        with pytest.raises(UserError, match=r"a\.tar: "):
            scan(tmp_path / "a.tar", content)


@pytest.mark.parametrize("size", [1 << 16, 1 << 33, 1 << 62, 1 << 80])
def test_a_header_of_any_length_is_not_read(tmp_path, size):
    for kind in (b"x", b"L", b"K", b"g"):
        with pytest.raises(UserError, match=r"a\.tar: truncated or not a tar: a header of \d+ bytes"):
            scan(tmp_path / "a.tar", member("0.cls", b"1") + header("0.png", size, kind) + END)


def test_a_member_that_claims_more_than_is_there_is_refused(tmp_path):
    for size in (4096, 1 << 31, 1 << 62):
        with pytest.raises(UserError, match=r"a\.tar: "):
            scan(tmp_path / "a.tar", member("0.cls", b"1") + header("0.png", size) + END)


def test_a_thousand_headers_before_a_header_are_refused(tmp_path):
    with pytest.raises(UserError, match="truncated or not a tar"):
        scan(tmp_path / "a.tar", b"".join(member("x", b"name", b"L") for _ in range(3000)) + END)


def test_a_key_with_dots_is_not_left_out_without_a_word(tmp_path):
    write_tar(
        tmp_path / "a.tar", [("a.cls", b"1"), ("a.fine.cls", b"7"), ("a.png", png(0)), ("a.x.png", b"")]
    )
    assert [sample.label for sample in scan_tar(tmp_path / "a.tar")] == [1]
    write_tar(
        tmp_path / "a.tar", [("a.cls", b"1"), ("a.png", png(0)), ("b.1.cls", b"1"), ("b.1.png", png(1))]
    )
    with pytest.raises(UserError, match=r"a\.tar: .*member 'b\.1\.cls': a key ends at its first dot"):
        list(scan_tar(tmp_path / "a.tar"))


def test_links_and_devices_are_no_images(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
            link = tarfile.TarInfo("0.png")
            link.type, link.linkname = kind, "/etc/passwd"
            tar.addfile(link)
        label = tarfile.TarInfo("0.cls")
        label.size = 1
        tar.addfile(label, io.BytesIO(b"1"))
    with pytest.raises(UserError, match="sample 0 has no image member"):
        list(scan_tar(path))


def test_a_sparse_map_without_an_end_is_refused(tmp_path):
    records = b"".join(
        b"%d %s\n" % (len(text) + 4, text)
        for text in (b"GNU.sparse.major=1", b"GNU.sparse.minor=0", b"GNU.sparse.name=0.png")
    )
    content = member("x", records, b"x") + member("0.png", b"999999999\n" + b"1" * 400)
    begin = time.monotonic()
    with pytest.raises(UserError):
        scan(tmp_path / "a.tar", content)
    assert time.monotonic() - begin < 5


@fuzz(80)
@given(st.data())
def test_any_bytes_give_samples_or_an_error_of_the_user(tmp_path, data):
    kinds = st.sampled_from([b"0", b"x", b"g", b"L", b"K", b"S", b"5", b"2", b"\0", b"V"])
    names = st.sampled_from(["0.png", "0.cls", "0.json", "1.jpg", "a/../b.png", "\x80", ""])
    sizes = st.one_of(st.integers(-600, 2000), st.integers(-(2**63), 2**80))
    pax = st.sampled_from([b"11 size=-9\n", b"12 size=1e9\n", b"20 GNU.sparse.map=1,\n", b"9 path=x\n"])
    block = st.one_of(
        st.builds(member, names, st.one_of(st.binary(max_size=40), st.just(b"7"), pax), kinds),
        st.builds(header, names, sizes, kinds),
        st.binary(max_size=700),
    )
    content = bytearray(
        b"".join(data.draw(st.lists(block, max_size=6))) + data.draw(st.sampled_from([b"", END]))
    )
    for at in data.draw(st.lists(st.integers(0, max(0, len(content) - 1)), max_size=3)) if content else ():
        content[at] = data.draw(st.integers(0, 255))
    samples: list = []
    assert "\n" not in message_of(lambda: samples.extend(scan(tmp_path / "a.tar", bytes(content))))
    streamed: list = []
    message = message_of(lambda: streamed.extend(read_tar(io.BytesIO(content), "a.tar")))
    assert "\n" not in message
    found = [bytes(content[sample.offset : sample.offset + sample.length]) for sample in samples]
    assert found == [image for name, image in streamed if not name.lower().endswith(".cls")] or not found
    assert not (samples and message)
