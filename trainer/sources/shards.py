"""Samples out of tars that other tools wrote (KEY.jpg, KEY.cls, KEY.json), to be shuffled and cut anew."""

import json
import os
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.sources.source import Source
from trainer.tars import TarSample, scan_tar

MAX_JSON = 1 << 20


def tar_samples(path: Path) -> Source:
    """Return the samples of a tar, or of all .tar files of a folder; classes are named by their numbers.

    bmp is packed as it is. Raises UserError naming the tar and the sample if one is broken.
    """
    paths = sorted(path.glob("*.tar")) if path.is_dir() else [path]
    if not paths:
        raise UserError(f"{path} holds no .tar file")
    found: list[tuple[Path, TarSample]] = [(tar, sample) for tar in paths for sample in scan_tar(tar)]
    if not found:
        raise UserError(f"{path}: no samples (KEY.jpg or another image, and KEY.cls)")

    def read_bytes(tar: Path, offset: int, length: int) -> bytes:
        with tar.open("rb") as file:
            content = os.pread(file.fileno(), length, offset)
        if len(content) != length:
            raise UserError(f"{tar}: {len(content)} of {length} bytes are there at byte {offset}")
        return content

    def read(i: int) -> tuple[bytes, str]:
        tar, sample = found[i]
        return read_bytes(tar, sample.offset, sample.length), sample.extension

    def notes(i: int) -> dict[str, Any]:
        tar, sample = found[i]
        where = f"{tar}: sample {sample.key!a}"
        if not sample.json_offset:
            return {}
        if sample.json_length > MAX_JSON:
            raise UserError(f"{where}: its json of {sample.json_length} bytes is above 1 MiB")
        try:
            note = json.loads(read_bytes(tar, sample.json_offset, sample.json_length))
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: its json is broken: {error}") from None
        return note if isinstance(note, dict) else {"json": note}

    has_notes = any(sample.json_offset for _, sample in found)
    return Source(
        [str(sample.label) for _, sample in found], read, files=paths, notes=notes if has_notes else None
    )
