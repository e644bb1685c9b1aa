"""What is in a tar of samples: nothing is unpacked, and nothing is read that is not of a sample.

A file is scanned for where its samples are, from the headers alone; a stream is read from front to back. A
sample is the members KEY.jpg (or .png, .webp, .jpeg, .bmp) and KEY.cls, and KEY.json where there is one.
The headers may come from anybody. ``tarfile`` believes them: it would read a header of any length, go
backwards by a negative size for ever, and end without a word at a truncated or broken member.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from trainer.errors import UserError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
MAX_LABEL = 2**31 - 1
MAX_IMAGE_BYTES = 1 << 26  # as in trainer.index
MAX_LABEL_BYTES = 32  # that are looked at
MAX_HEADER = 1 << 14  # bytes of one extended header: long names, attributes
MAX_EMPTY_READS = 8
END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, at least, follow the last member

# As webdataset splits: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
# What tarfile lets through of broken headers; a recursion is one header before another, a thousand times.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, KeyError, IndexError)
_PIECE = 1 << 18


class TarSample(NamedTuple):
    """Where one sample of a tar is."""

    key: str
    extension: str
    offset: int
    """Byte of the tar where the image begins."""
    length: int
    label: int
    json_offset: int
    """Byte where the text of KEY.json begins; 0 without one."""
    json_length: int


def scan_tar(path: Path) -> Iterator[TarSample]:
    """Yield every sample of a tar. Raises UserError naming the tar, and the sample if it is incomplete."""
    sample: dict[str, tarfile.TarInfo] = {}
    key = ""
    with _broken_tar_told(path), path.open("rb") as file:
        for member, own_key, part in _parts(path, _Forward(file)):
            if sample and (own_key != key or part in sample):
                yield from _described(path, key, sample, file)
                sample = {}
            key = own_key
            sample[part] = member
        yield from _described(path, key, sample, file)


def read_tar(file: BinaryIO, where: object) -> Iterator[tuple[str, bytes]]:
    """Yield name and bytes of every image and label of a tar that is read once, from front to back.

    The limits are those of ``scan_tar``; of a label the first bytes are enough. Raises UserError naming
    ``where``.
    """
    with _broken_tar_told(where):
        forward = _Forward(file)
        for member, key, part in _parts(where, forward):
            if part == "image":
                _require_image(f"{where}: sample {ascii(key)[1:-1]}", member)
            size = member.size if part == "image" else min(member.size, MAX_LABEL_BYTES)
            if part != "json":
                if len(content := forward.take(size)) < size:
                    raise tarfile.ReadError("unexpected end of data")
                yield member.name, content


def _parts(where: object, file: "_Forward") -> Iterator[tuple[tarfile.TarInfo, str, str]]:
    """Yield (member, key, "image", "cls" or "json") of all that samples are made of, then check the end.

    A label of its own behind the first dot is that of a key with dots, which would be left out unsaid.
    """
    key = None
    with tarfile.open(fileobj=cast(Any, file), mode="r:") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
            if member.size < 0:
                raise tarfile.ReadError(f"member {member.name!a} has {member.size} bytes")
            if member.issparse():
                raise tarfile.ReadError(f"member {member.name!a} is sparse")
            match = _MEMBER.fullmatch(member.name)
            extension = match[2].lower() if match else ""
            if match is None or not member.isreg():
                continue
            if extension.endswith(".cls") and match[1] != key:
                raise tarfile.ReadError(
                    f"member {member.name!a}: a key ends at its first dot, and has no others"
                )
            if _is_part(extension):
                key = match[1]
                yield member, key, extension if extension in ("cls", "json") else "image"
        _check_end(where, file, tar.offset)  # type: ignore[attr-defined]


@contextmanager
def _broken_tar_told(where: object) -> Iterator[None]:
    try:
        yield
    except _BROKEN as error:
        reason = " ".join(ascii(str(error))[1:-1].split())
        raise UserError(f"{where}: truncated or not a tar: {reason}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot read: {error.strerror}") from None


def require_end(path: Path) -> None:
    """Raise UserError unless a tar ends with two zero blocks: what is cut off would not be missed."""
    try:
        with path.open("rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - END_BYTES))
            last = file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    if last != bytes(END_BYTES):
        raise UserError(f"{path}: truncated: no end of archive")


class _Forward:
    """A file for tarfile, which reads no more than headers from it, and never goes back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._position = self._empty_reads = 0
        self.last = b""
        """What was read last: the header of the next member, or what is there instead."""

    def tell(self) -> int:
        return self._position

    def seek(self, position: int) -> None:
        if position < self._position:
            raise tarfile.ReadError("a header that leads back")
        if self._file.seekable():
            self._position = self._file.seek(position)
        while self._position < position and self.take(min(position - self._position, _PIECE)):
            pass

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        self.last = self.take(size)
        self._empty_reads += not self.last
        if self._empty_reads > MAX_EMPTY_READS:  # tarfile waits for the rest of a sparse map for ever
            raise tarfile.ReadError("unexpected end of data")
        return self.last

    def take(self, size: int) -> bytes:
        """Return the next bytes of the file."""
        content = self._file.read(size)
        self._position += len(content)
        return content


def _is_part(extension: str) -> bool:
    return extension in IMAGE_EXTENSIONS or extension in ("cls", "json")


def _described(
    path: Path, key: str, sample: dict[str, tarfile.TarInfo], file: BinaryIO
) -> Iterator[TarSample]:
    if not sample.keys() - {"json"}:
        return  # a note of another kind
    where = f"{path}: sample {ascii(key)[1:-1]}"
    if missing := {"image", "cls"} - sample.keys():
        raise UserError(f"{where} has no {min(missing)} member next to its {next(iter(sample))}")
    image, label, note = sample["image"], sample["cls"], sample.get("json")
    _require_image(where, image)
    # The scan reads headers in order: pread leaves the position of the file alone.
    text = os.pread(file.fileno(), min(label.size, MAX_LABEL_BYTES), label.offset_data)
    if not re.fullmatch(rb"\s*\d{1,20}\s*", text) or int(text) > MAX_LABEL:
        raise UserError(f"{where}: label must be an integer from 0 to {MAX_LABEL}, it is {ascii(text)[1:]}")
    yield TarSample(
        key=key,
        extension=image.name.rpartition(".")[2].lower(),
        offset=image.offset_data,
        length=image.size,
        label=int(text),
        json_offset=note.offset_data if note else 0,
        json_length=note.size if note else 0,
    )


def _require_image(where: str, image: tarfile.TarInfo) -> None:
    if not 0 < image.size <= MAX_IMAGE_BYTES:
        limit = MAX_IMAGE_BYTES >> 20
        raise UserError(f"{where}: image is empty or above {limit} MiB ({image.size} bytes)")


def _check_end(where: object, file: _Forward, end: int) -> None:
    """Raise UserError unless two zero blocks, and nothing but zeros, follow the last member.

    tarfile takes a cut at a member's boundary, and a broken header, for the end: both lose samples.
    """
    chunk, size = file.last, 0
    while chunk:
        size += len(chunk)
        if chunk.count(0) != len(chunk):
            raise UserError(f"{where}: broken header, or another tar glued on, at byte {end}")
        chunk = file.take(_PIECE)
    if size < END_BYTES:
        raise UserError(f"{where}: truncated: no end of archive at byte {end}")
