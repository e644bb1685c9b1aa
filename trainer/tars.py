"""What is in a tar of samples, told from its headers alone: nothing is unpacked, nothing large is read.

A sample is the members KEY.jpg (or .png, .webp, .jpeg, .bmp) and KEY.cls, and KEY.json where there is one.
The headers may come from anybody. ``tarfile`` believes them: it would read a header of any length, go
backwards by a negative size for ever, and end without a word at a truncated or broken member.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, cast

from trainer.errors import UserError

IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "bmp")
MAX_LABEL = 2**31 - 1
MAX_IMAGE_BYTES = 1 << 26  # as in trainer.index
MAX_HEADER = 1 << 14  # bytes of one extended header: long names, attributes
MAX_EMPTY_READS = 8
END_BYTES = 2 * tarfile.BLOCKSIZE  # of zeros, at least, follow the last member

# As webdataset splits: the key ends at the first dot of the last path component.
_MEMBER = re.compile(r"((?:.*/|)[^./]+)\.([^/]*)", re.DOTALL)
# What tarfile lets through of broken headers; a recursion is one header before another, a thousand times.
_BROKEN = (tarfile.TarError, ValueError, OverflowError, RecursionError, KeyError, IndexError)


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
    try:
        with path.open("rb") as file, tarfile.open(fileobj=cast(Any, _Headers(file)), mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else every header stays in memory
                if member.size < 0:
                    raise tarfile.ReadError(f"member {member.name!a} has {member.size} bytes")
                match = _MEMBER.fullmatch(member.name)
                extension = match[2].lower() if match else ""
                if match is None or not member.isreg() or not _is_part(extension):
                    continue
                part = extension if extension in ("cls", "json") else "image"
                if sample and (match[1] != key or part in sample):
                    yield from _described(path, key, sample, file)
                    sample = {}
                key = match[1]
                sample[part] = member
            yield from _described(path, key, sample, file)
            _check_end(path, file, tar.offset)  # type: ignore[attr-defined]
    except _BROKEN as error:
        reason = " ".join(ascii(str(error))[1:-1].split())
        raise UserError(f"{path}: truncated or not a tar: {reason}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


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


class _Headers:
    """A file for tarfile, which reads no more than headers from it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._empty_reads = 0
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER:
            raise tarfile.ReadError(f"a header of {size} bytes")
        content = self._file.read(size)
        self._empty_reads += not content
        if self._empty_reads > MAX_EMPTY_READS:  # tarfile waits for the rest of a sparse map for ever
            raise tarfile.ReadError("unexpected end of data")
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
    if image.issparse() or label.issparse() or not 0 < image.size <= MAX_IMAGE_BYTES:
        limit = MAX_IMAGE_BYTES >> 20
        raise UserError(f"{where}: image is sparse, empty or above {limit} MiB ({image.size} bytes)")
    # The scan reads headers in order: pread leaves the position of the file alone.
    text = os.pread(file.fileno(), min(label.size, 32), label.offset_data)
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


def _check_end(path: Path, file: BinaryIO, end: int) -> None:
    """Raise UserError unless two zero blocks, and nothing but zeros, follow the last member.

    tarfile takes a cut at a member's boundary, and a broken header, for the end: both lose samples.
    """
    file.seek(end)
    size = 0
    while chunk := file.read(1 << 20):
        size += len(chunk)
        if chunk.count(0) != len(chunk):
            raise UserError(f"{path}: broken header, or another tar glued on, at byte {end}")
    if size < END_BYTES:
        raise UserError(f"{path}: truncated: no end of archive at byte {end}")
