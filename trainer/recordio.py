"""MXNet's RecordIO as InsightFace writes it: DATA.rec, found through DATA.idx. Pure Python, no MXNet.

::

    DATA.idx   lines of "KEY<tab>OFFSET"
    DATA.rec   records: magic, word, content, zeros to a multiple of 4
               word = part << 29 | length;  part 0: whole, 1: first, 2: middle, 3: last of a record that was
               cut where it contained the magic
    content    flag u32, label f32, id u64, id2 u64; if flag > 0, so many f32 labels follow; then the image

Record 0 of a data set with identities has no image: its labels are [first key after the images, first key
after the identities]. A label is a float32, which knows no odd numbers above 2^24: two people would be one.
"""

import os
import struct
import weakref
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from trainer.errors import UserError

MAGIC = 0xCED7230A
MAX_RECORD = 1 << 28  # bytes; the word could say 512 MiB, and parts could add up to anything
MAX_LABELS = 1 << 16
EXACT = 1 << 24

_WORDS = struct.Struct("<II")
_HEADER = struct.Struct("<IfQQ")


class Record(NamedTuple):
    """One record."""

    labels: tuple[float, ...]
    image: bytes


class RecordFile:
    """A pair of .rec and .idx, opened; reads any record with one or two reads, in forked processes too."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.keys_N, self.offsets_N = _read_idx(path.with_suffix(".idx"))
        try:
            self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise UserError(f"{path}: cannot read: {error.strerror}") from None
        self._size = os.fstat(self._descriptor).st_size
        weakref.finalize(self, os.close, self._descriptor)

    def read(self, i: int) -> Record:
        """Return record ``i`` in the order of the keys. Raises UserError naming the file and the key."""
        return self._parsed(i, self._content(i, MAX_RECORD))

    def labels(self, i: int) -> tuple[float, ...]:
        """Return the labels of record ``i`` in the order of the keys, without reading its image."""
        start = self._content(i, _HEADER.size)
        flag = _HEADER.unpack(start)[0] if len(start) == _HEADER.size else 0
        if flag:
            start = self._content(i, _HEADER.size + 4 * min(flag, MAX_LABELS))
        return self._parsed(i, start).labels

    def describe(self, i: int) -> str:
        """Return where record ``i`` is, for messages."""
        return f"{self.path}: record {self.keys_N[i]} at byte {self.offsets_N[i]}"

    def _content(self, i: int, wanted: int) -> bytes:
        """Return the first ``wanted`` bytes of a record's content, over its parts."""
        content, offset, expected = bytearray(), int(self.offsets_N[i]), (0, 1)
        while True:
            magic, word = self._words(i, offset)
            part, length = word >> 29, word & 0x1FFFFFFF
            if magic != MAGIC or part not in expected or len(content) + length > MAX_RECORD:
                raise UserError(
                    f"{self.describe(i)}: no record begins at byte {offset}, or one above 256 MiB"
                )
            if offset + _WORDS.size + length > self._size:
                raise UserError(f"{self.describe(i)}: truncated")
            content += self._pread(min(length, wanted - len(content)), offset + _WORDS.size)
            if len(content) >= wanted or part in (0, 3):
                return bytes(content)
            content += _WORDS.pack(MAGIC, 0)[:4]
            offset += _WORDS.size + (length + 3) // 4 * 4
            expected = (2, 3)

    def _words(self, i: int, offset: int) -> tuple[int, int]:
        words = self._pread(_WORDS.size, offset)
        if len(words) < _WORDS.size:
            raise UserError(f"{self.describe(i)}: truncated, or beyond the end of the file")
        return _WORDS.unpack(words)

    def _pread(self, size: int, offset: int) -> bytes:
        try:
            return os.pread(self._descriptor, size, offset)
        except (OSError, OverflowError) as error:
            raise UserError(f"{self.path}: cannot read byte {offset}: {error}") from None

    def _parsed(self, i: int, content: bytes) -> Record:
        if len(content) < _HEADER.size:
            raise UserError(f"{self.describe(i)}: {len(content)} bytes are less than its header")
        flag, label, _, _ = _HEADER.unpack_from(content)
        end = _HEADER.size + 4 * flag
        if flag > MAX_LABELS or end > len(content):
            raise UserError(f"{self.describe(i)}: {flag} labels do not fit into it")
        labels = struct.unpack_from(f"<{flag}f", content, _HEADER.size) if flag else (label,)
        return Record(labels, content[end:])


def whole_number(label: float, where: str) -> int:
    """Return a label as an integer. Raises UserError for fractions, and where float32 may have rounded it."""
    if not 0 <= label < EXACT or label != int(label):
        raise UserError(
            f"{where}: label {label:.9g} is not a whole number below 2^24 (above, float32 merges neighbours)"
        )
    return int(label)


def _read_idx(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    try:
        words = path.read_bytes().split()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None
    try:
        table = np.array([int(word) for word in words], dtype=np.int64).reshape(-1, 2)
        if table.size and table.min() < 0:
            raise ValueError(f"{table.min()} is negative")
    except (ValueError, OverflowError) as error:
        raise UserError(f"{path}: not lines of KEY<tab>OFFSET: {str(error)[:100]!a}") from None
    table = table[np.argsort(table[:, 0], kind="stable")]
    return table[:, 0], table[:, 1]
