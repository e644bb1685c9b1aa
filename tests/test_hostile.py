"""Data made to do harm: it is refused in one line, or harmless. Nothing in it runs, nothing is unpacked."""

import contextlib
import gzip
import io
import json
import pickle
import struct
import tarfile
import tracemalloc
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from trainer import stream, tars
from trainer.augment import build_eval_transform
from trainer.decode import decode
from trainer.errors import UserError
from trainer.index import ARRAYS, MAX_IMAGE_BYTES, load_index, open_index
from trainer.order import Position
from trainer.shards import build_index, write_shards
from trainer.stream import StreamSource, build_stream_loader

ALLOCATION_LIMIT = 32 << 20
few = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), database=None)


def png(width: int = 4, height: int = 4) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(buffer, "PNG")
    return buffer.getvalue()


def member(
    name: str | bytes, content: bytes = b"", kind: bytes = b"0", size: bytes | None = None, link: bytes = b""
) -> bytes:
    """Return a tar member, header and content, with a right checksum around whatever the header says."""
    name = name.encode() if isinstance(name, str) else name
    size = b"%011o\0" % len(content) if size is None else size
    header = bytearray(tarfile.BLOCKSIZE)
    header[0:100] = name[:100].ljust(100, b"\0")
    header[100:108], header[124:136], header[156:157] = b"0000644\0", size.ljust(12, b"\0"), kind
    header[157:257], header[257:265] = link.ljust(100, b"\0"), b"ustar\x0000"
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header) + content + bytes(-len(content) % tarfile.BLOCKSIZE)


SAMPLE = member("000.png", png()) + member("000.cls", b"1")
END = bytes(1024)


def scan(folder: Path, content: bytes):
    """Index a tar of these bytes: without a huge allocation, whatever they say."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / "x.tar").write_bytes(content)
    tracemalloc.start()
    try:
        return build_index(folder)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < ALLOCATION_LIMIT


def every_file(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "key", ["../../escaped", "/etc/cron.d/evil", "a/../../../b", "~root/x", "C:\\x", "%2e%2e/x"]
)
def test_names_that_lead_elsewhere_are_names_only(tmp_path, key):
    index = scan(tmp_path / "in", member(f"{key}.png", png()) + member(f"{key}.cls", b"1") + END)
    assert index.read(0) == png()
    assert every_file(tmp_path) == {
        "in",
        "in/x.tar",
        "in/index",
        *(f"in/index/{n}" for n in every_file(tmp_path / "in/index")),
    }


@pytest.mark.parametrize("kind", [b"1", b"2", b"3", b"4", b"5", b"6", b"S", b"Z"])
def test_links_devices_folders_and_sparse_files_are_not_images(tmp_path, kind):
    odd = member("111.png", b"", kind, link=b"/etc/passwd") + member("111.cls", b"1")
    with pytest.raises(UserError, match=r"x\.tar: "):
        scan(tmp_path / "a", odd + END)
    assert (
        scan(tmp_path / "b", SAMPLE + member("link.png", b"", b"2", link=b"/etc/passwd") + END).num_samples
        == 1
    )


class Bomb:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "extension", ["pyd", "pth", "pt", "pkl", "pickle", "npy", "npz", "gz", "yaml", "json", "ten"]
)
def test_members_that_other_readers_would_run_or_inflate_are_never_decoded(tmp_path, extension):
    bomb = pickle.dumps(Bomb(tmp_path / "owned"))
    index = scan(
        tmp_path / "in", member(f"000.{extension}", bomb) + SAMPLE + member("001." + extension, bomb) + END
    )
    assert index.num_samples == 1
    assert decode(index.read(0), 3).shape == (3, 4, 4)
    assert not (tmp_path / "owned").exists()


def test_pickles_in_place_of_image_and_label_are_not_unpickled(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "owned"))
    with pytest.raises(UserError, match="label must be an integer"):
        scan(tmp_path / "a", member("000.png", png()) + member("000.cls", bomb) + END)
    index = scan(tmp_path / "b", member("000.png", bomb) + member("000.cls", b"0") + END)
    with pytest.raises(ValueError, match="cannot decode"):
        decode(index.read(0), 3)
    assert not (tmp_path / "owned").exists()


def base256(number: int) -> bytes:
    return ((1 << 95) + number if number >= 0 else (1 << 96) + number).to_bytes(12, "big")


HEADERS = {
    "negative size": member("000.png", b"", size=base256(-1024)),
    "negative size, back to the start": SAMPLE + member("a.txt", b"", size=base256(-(len(SAMPLE) + 512))),
    "huge size": member("000.png", b"", size=base256(2**62)),
    "size over the end": member("000.png", b"", size=b"77777777777\0"),
    "huge long name": member("././@LongLink", b"", b"L", size=base256(2**40)),
    "huge link name": member("././@LongLink", b"", b"K", size=base256(2**33)),
    "huge pax header": member("pax", b"", b"x", size=base256(2**40)),
    "negative long name": member("././@LongLink", b"", b"L", size=base256(-512)),
    "negative pax header": member("pax", b"", b"x", size=base256(-512)),
    "pax with a negative size": member("pax", b"14 size=-1024\n", b"x") + member("000.png", b""),
    "pax with a size that is none": member("pax", b"11 size=1e9\n", b"x") + member("000.png", b""),
    "pax with a record longer than itself": member("pax", b"999999 path=x\n", b"x") + SAMPLE,
    "pax with a record of no length": member("pax", b"0 path=x\n", b"x") + SAMPLE,
    "pax, not utf-8": member("pax", b"12 path=\xff\xfe\n", b"x") + SAMPLE,
    "pax upon pax": b"".join(member("pax", b"9 a=b\n", b"x") for _ in range(3000)),
    "pax, digits for a slow pattern": member("pax", b"1" * 30_000, b"x") + SAMPLE,
    "pax sparse map": member("pax", b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n", b"x")
    + member("000.png", b"9" * 512),
    "old sparse map without end": member("000.png", b"", b"S") + bytes(512),
    "number that is none": member("000.png", b"", size=b"89abcdefghi\0"),
    "nothing": b"",
    "only zeros": bytes(10_240),
}  # fmt: skip


@pytest.mark.parametrize("name", HEADERS)
def test_headers_that_lie_are_refused_at_once_and_allocate_nothing(tmp_path, name):
    with pytest.raises(UserError, match=str(tmp_path)) as caught:
        scan(tmp_path, HEADERS[name] + END)
    assert str(caught.value).isprintable()


def test_names_that_are_not_utf8_are_told_in_ascii(tmp_path):
    index = scan(
        tmp_path / "a", member(b"\xff\xfe\x1b[2J.png", png()) + member(b"\xff\xfe\x1b[2J.cls", b"0") + END
    )
    assert index.describe(0).isascii()
    assert index.describe(0).isprintable()
    with pytest.raises(UserError) as caught:
        scan(tmp_path / "b", member(b"\xff\x1b]0;x\x07.png", png()) + END)
    assert str(caught.value).isprintable()


def test_a_member_above_the_limit_is_refused_when_it_is_indexed(tmp_path):
    assert tars.MAX_IMAGE_BYTES == MAX_IMAGE_BYTES
    folder = tmp_path / "in"
    folder.mkdir()
    with (folder / "x.tar").open("wb") as file:
        file.write(member("000.png", b"", size=b"%011o\0" % (MAX_IMAGE_BYTES + 1)))
        file.seek(-(-(MAX_IMAGE_BYTES + 1) // 512) * 512, io.SEEK_CUR)  # a hole: it takes no room
        file.write(member("000.cls", b"0") + END)
    with pytest.raises(UserError, match=rf"sample 000: image .*\({MAX_IMAGE_BYTES + 1} bytes\)"):
        build_index(folder)


# The index.


@pytest.fixture
def packed(tmp_path):
    return write_shards([(png(), "png", i % 2) for i in range(4)], tmp_path / "set", ["a", "b"], 2).folder


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_index(folder, "data.train")
    message = str(caught.value)
    assert message.startswith("data.train: the index of ")
    assert message.isprintable()
    return message


def change_head(folder: Path, change) -> None:
    path = folder / "index" / "index.json"
    head = json.loads(path.read_text())
    change(head)
    path.write_text(json.dumps(head))


@pytest.mark.parametrize(
    "name",
    [
        "../x.tar",
        "/etc/passwd",
        "a/b.tar",
        "..",
        ".",
        "",
        "a\\b",
        "\x1b[2J",
        "-rf",
        ".hidden",
        "x" * 256,
        7,
        None,
        ["x"],
    ],
)
def test_shards_outside_of_the_folder_are_refused(packed, name):
    change_head(packed, lambda head: head["shards"][0].update(name=name))
    assert "is not the name of a file beside the index" in refusal(packed)


CHANGES = {
    "negative n": lambda head: head["shards"][0].update(n=-2),
    "huge n": lambda head: head["shards"][0].update(n=2**60),
    "n is a fraction": lambda head: head["shards"][0].update(n=2.0),
    "n is true": lambda head: head["shards"][0].update(n=True),
    "n beyond the arrays": lambda head: head["shards"][0].update(n=10**12),
    "negative size": lambda head: head["shards"][0].update(bytes=-1),
    "hash is a path": lambda head: head["shards"][0].update(sha256="../../../etc/passwd"),
    "hash in capitals": lambda head: head["shards"][0].update(sha256="A" * 64),
    "unknown entry": lambda head: head["shards"][0].update(url="pipe:id"),
    "twice the same": lambda head: head["shards"].append(head["shards"][0]),
    "no shards": lambda head: head.update(shards=[]),
    "shards are text": lambda head: head.update(shards="abc"),
    "no classes": lambda head: head.update(num_classes=0),
    "classes are text": lambda head: head.update(num_classes="2"),
    "names are halves of characters": lambda head: head.update(class_names=["a", "\ud800"]),
    "names are numbers": lambda head: head.update(class_names=[1, 2]),
    "too many names": lambda head: head.update(class_names=["a"] * 3),
    "fingerprint is a list": lambda head: head.update(fingerprint=[]),
    "array elsewhere": lambda head: head["arrays"].update({"../../x": {"bytes": 1, "sha256": "0" * 64}}),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_index_json_that_lies_is_refused(packed, name):
    change_head(packed, CHANGES[name])
    refusal(packed)


@pytest.mark.parametrize(
    "text", ["[" * 100_000, "1" * 10_000, "null", "[]", '{"version": NaN}', "\xff", '"\\ud800"']
)
def test_an_index_json_that_is_none_is_refused(packed, text):
    (packed / "index" / "index.json").write_bytes(text.encode("latin-1"))
    refusal(packed)


@pytest.mark.parametrize(
    ("array", "value", "reason"),
    [
        ("offset", -512, "offset.npy has images outside of data-000000.tar"),
        ("offset", 511, "offset.npy has images outside of data-000000.tar"),
        ("offset", 2**62, "offset.npy has images outside of data-000000.tar"),
        ("offset", 2**63 - 1, "offset.npy has images outside of data-000000.tar"),
        ("length", 0, "length.npy has images outside 1.."),
        ("length", -1, "length.npy has images outside 1.."),
        ("length", MAX_IMAGE_BYTES + 1, "length.npy has images outside 1.."),
        ("length", MAX_IMAGE_BYTES, "offset.npy has images outside of data-000000.tar"),
    ],
)
def test_places_outside_of_the_shard_are_refused_before_anything_is_read(packed, array, value, reason):
    path = packed / "index" / f"{array}.npy"
    column_N = np.load(path, allow_pickle=False)
    column_N[1] = value
    path.unlink()
    np.save(path, column_N, allow_pickle=False)
    assert reason in refusal(packed)


# Images.


def claiming_png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", head)
        + chunk(b"IDAT", zlib.compress(rows, 9))
        + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("width", "height"), [(8193, 8192), (50_000, 50_000), (2**31 - 1, 2**31 - 1), (2**31 - 1, 1)]
)
def test_a_small_file_that_is_a_huge_image_is_refused_before_it_is_decoded(width, height):
    bomb = claiming_png(width, height, bytes(10_000_000))
    assert len(bomb) < 20_000
    tracemalloc.start()
    with pytest.raises(ValueError, match=r"pixels|cannot decode") as caught:
        decode(bomb, 3)
    assert tracemalloc.get_traced_memory()[1] < ALLOCATION_LIMIT
    tracemalloc.stop()
    assert "\n" not in str(caught.value)


def test_more_rows_than_a_png_says_do_not_matter():
    assert decode(claiming_png(2, 2, bytes(5_000_000)), 3).shape == (3, 2, 2)


@pytest.mark.parametrize("size", [(0, 0), (0, 5), (5, 0)])
def test_an_image_without_pixels_is_refused(size):
    header = struct.pack("<2sIHHI", b"BM", 54, 0, 0, 54) + struct.pack(
        "<IiiHHIIiiII", 40, *size, 1, 24, 0, 0, 0, 0, 0, 0
    )
    for content in (header, claiming_png(*size, b"")):
        with pytest.raises(ValueError, match="cannot decode"):
            decode(content, 3)


@pytest.mark.parametrize(
    "content", [b"%!PS-Adobe-3.0 EPSF-3.0\n", b"GIF89a", b"II*\0", b"<svg/>", b"8BPS", b"", b"\0" * 100]
)
def test_formats_with_programs_in_them_and_others_are_not_tried(content):
    with pytest.raises(ValueError, match="cannot decode"):
        decode(content, 3)


# The second reader.


class Arriving(io.BytesIO):
    """Bytes that come once."""

    def seekable(self) -> bool:
        return False

    def seek(self, *_: int) -> int:
        raise io.UnsupportedOperation


LABEL, TOO_LONG = member("000.cls", b"0"), b"%011o\0" % (MAX_IMAGE_BYTES + 1)
STREAMED = {name: (content + END, "") for name, content in HEADERS.items()} | {
    "nothing but links": (member("000.png", b"", b"2", link=b"/etc/passwd") + END, "holds no samples"),
    "sparse": (member("000.png", bytes(512), b"S") + LABEL + END, "member '000.png' is sparse"),
    "compressed": (gzip.compress(bytes(1 << 26)) + END, "truncated or not a tar"),
    "many pixels": (LABEL + member("000.png", claiming_png(8193, 8192, b"")) + END, "8193 x 8192 pixels"),
    "many bytes": (LABEL + member("000.png", b"", size=TOO_LONG) + END, "empty or above 64 MiB"),
    "twice": (LABEL + LABEL + member("000.png", png()) + END, "000.cls: duplicate file name"),
    "a pickle for a label": (member("000.cls", pickle.dumps(3)) + member("000.png", png()) + END, "integer"),
    "a long label": (member("000.cls", b"1" * 33) + member("000.png", png()) + END, "label must be"),
    "no end": (LABEL + member("000.png", png()) + bytes(512), "truncated: no end of archive"),
    "another tar behind": (SAMPLE + END + SAMPLE + END, "broken header, or another tar glued on"),
}


@pytest.mark.parametrize("comes_once", [False, True])
@pytest.mark.parametrize("name", STREAMED)
def test_a_stream_refuses_what_an_index_refuses(tmp_path, name, comes_once, monkeypatch):
    content, reason = STREAMED[name]
    (tmp_path / "x.tar").write_bytes(content)
    if comes_once:
        monkeypatch.setattr(stream, "_opened", lambda shard: Arriving(content))
    options = {"channels": 3, "shuffle_buffer": 2, "smallest_side": None, "seed": 0}
    source = StreamSource(shards=(tmp_path / "x.tar",), num_classes=4, **options)
    options = {"global_batch": 1, "rank": 0, "world_size": 1, "workers": 0, "epoch_images": 4}
    steps = build_stream_loader(source, build_eval_transform(image_size=4), **options, start=Position())
    tracemalloc.start()
    try:
        with pytest.raises(UserError) as caught:
            next(steps)
        assert tracemalloc.get_traced_memory()[1] < ALLOCATION_LIMIT
    finally:
        tracemalloc.stop()
    assert str(caught.value).startswith(f"rank 0: {tmp_path}/x.tar")
    assert reason in str(caught.value)
    assert str(caught.value).isprintable()


def test_a_stream_skips_what_is_neither_image_nor_label(tmp_path):
    bomb = pickle.dumps(Bomb(tmp_path / "owned"))
    odd = b"".join(member(f"000.{extension}", bomb) for extension in ("pyd", "pth", "json", "gz", "yaml"))
    content = odd + member("000.link", b"", b"2", link=b"/etc/passwd") + SAMPLE + END
    assert list(tars.read_tar(Arriving(content), "here")) == [("000.png", png()), ("000.cls", b"1")]


# Any bytes at all: a result or an error of the kind that is promised.


def spoiled(valid: bytes):
    """Valid bytes with a few of them changed, cut out, or put in."""
    edit = st.tuples(st.integers(0, len(valid) - 1), st.integers(0, 40), st.binary(max_size=40))

    def apply(edits) -> bytes:
        content = valid
        for at, removed, inserted in edits:
            content = content[:at] + inserted + content[at + removed :]
        return content

    return st.lists(edit, min_size=1, max_size=4).map(apply)


TAR = SAMPLE + member("pax", b"18 path=second.png\n", b"x") + SAMPLE + member("second.cls", b"2") + END


@few
@given(content=st.one_of(st.binary(max_size=2048), spoiled(SAMPLE + END), spoiled(TAR)))
def test_any_bytes_as_a_tar(tmp_path_factory, content):
    with contextlib.suppress(UserError):
        index = scan(tmp_path_factory.getbasetemp() / "fuzz", content)
        assert all(len(index.read(i)) == index.lengths_N[i] for i in range(index.num_samples))


@few
@given(data=st.data())
def test_any_bytes_as_an_index(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "fuzzed-index"
    if not folder.exists():
        write_shards([(png(), "png", i % 2) for i in range(4)], folder, ["a", "b"], 2)
    name = data.draw(st.sampled_from(["index.json", *(f"{array}.npy" for array in ARRAYS)]))
    path = folder / "index" / name
    valid = path.read_bytes()
    content = data.draw(st.one_of(st.binary(max_size=300), spoiled(valid)))
    path.unlink()  # what is mapped must not change
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with contextlib.suppress(UserError):
            index = load_index(folder, "data.train")
            for i in range(index.num_samples):
                with contextlib.suppress(UserError):
                    index.read(i)
    finally:
        assert tracemalloc.get_traced_memory()[1] < ALLOCATION_LIMIT
        tracemalloc.stop()
        path.unlink()
        path.write_bytes(valid)


def formats() -> list[bytes]:
    image = Image.fromarray(np.arange(300, dtype=np.uint8).reshape(10, 10, 3))
    found = []
    for name in ("PNG", "JPEG", "WEBP", "BMP"):
        buffer = io.BytesIO()
        image.save(buffer, name)
        found.append(buffer.getvalue())
    return found


@few
@given(content=st.one_of(st.binary(max_size=300), *map(spoiled, formats())), channels=st.sampled_from([1, 3]))
def test_any_bytes_as_an_image(content, channels):
    with contextlib.suppress(ValueError):
        pixels_CHW = decode(content, channels)
        assert pixels_CHW.shape[0] == channels
        assert pixels_CHW.numel() > 0
