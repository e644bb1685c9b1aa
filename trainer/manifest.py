"""A checkpoint as files: its name, its record, and the sizes and hashes that make damage visible.

Knows neither tensors nor ranks. The manifest is written last: a folder without it was never finished.
"""

import fnmatch
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError

FORMAT = 2
"""1 had no manifest; it is still read, unverified."""

MANIFEST = "manifest.json"
PREFIX, TEMPORARY, REPLACED = "step-", ".tmp-step-", ".replaced-step-"

log = logging.getLogger("trainer")


class Entry(NamedTuple):
    """What is known of one file."""

    size_bytes: int
    sha256: str


def entry_of(path: Path) -> Entry:
    """Return size and hash of a file as it is now."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return Entry(os.fstat(file.fileno()).st_size, digest)


def write_manifest(folder: Path, entries: dict[str, Entry]) -> None:
    """Write the manifest of ``folder`` and make it, and the folder's list of files, survive a power cut."""
    files = {name: entry._asdict() for name, entry in sorted(entries.items())}
    path = folder / MANIFEST
    path.write_text(json.dumps({"files": files}, indent=1))
    sync(path)
    sync(folder)


def read_manifest(folder: Path) -> dict[str, Entry]:
    """Return the entries by file name. Raises OSError or ValueError if there is no manifest in it."""
    tree = json.loads((folder / MANIFEST).read_text())
    try:
        return {name: Entry(**entry) for name, entry in tree["files"].items()}
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(f"not a manifest: {error!r}") from None


def damage(folder: Path, part: int = 0, parts: int = 1, pattern: str = "*") -> list[str]:
    """Return one line for every file, called like ``pattern``, that is not as it was written.

    The work can be shared: each of ``parts`` readers looks at every ``parts``-th file, and all at the list.
    """
    try:
        entries = read_manifest(folder)
    except (OSError, ValueError) as error:
        return [f"{folder / MANIFEST}: {error}"]
    listed = fnmatch.filter(sorted(entries), pattern)
    found = [_difference(folder / name, entries[name]) for name in listed[part::parts]]
    unlisted = {path.name for path in folder.glob("*.safetensors")} - entries.keys()
    found += [
        f"{folder / name}: is not in the manifest"
        for name in fnmatch.filter(sorted(unlisted), pattern)[part::parts]
    ]
    return [line for line in found if line]


def _difference(path: Path, expected: Entry) -> str:
    """Return what is wrong with a file, or an empty text. Its size is looked at first: that costs nothing."""
    try:
        size = path.stat().st_size
        if size != expected.size_bytes:
            return f"{path}: has {size} bytes, {expected.size_bytes} were written"
        if entry_of(path) != expected:
            return f"{path}: its content is not what was written (sha256 differs)"
    except OSError as error:
        return f"{path}: cannot read: {error.strerror}"
    return ""


def complete_checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints below ``folder``, oldest first."""
    found = [path for path in folder.glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(found, key=step_of)


def step_of(path: Path) -> int:
    """Return the step after which a checkpoint was written: its folder is called so."""
    return int(path.name.removeprefix(PREFIX))


def remove_rubbish(folder: Path) -> None:
    """Remove what saves left that did not come to an end, and say so; a checkpoint being replaced returns."""
    for path in sorted(folder.glob(f"{REPLACED}*")):
        whole = folder / path.name.replace(REPLACED, PREFIX)
        if whole.exists():
            shutil.rmtree(path)
        else:
            path.rename(whole)
            log.warning("%s: restored; it was to be replaced by a save that did not come to its end", whole)
    for path in sorted(folder.glob(f"{TEMPORARY}*")):
        shutil.rmtree(path)
        log.warning("%s: removed; it was left by a save that did not come to its end", path)


def verify(path: Path, pattern: str = "*", part: int = 0, parts: int = 1) -> None:
    """Raise UserError naming the first file of a checkpoint that is not as it was written, see ``damage``."""
    if read_record(path)["format"] == 1:
        log.warning("%s: has no checksums (format 1), so it cannot be verified", path)
    elif found := damage(path, part, parts, pattern):
        raise UserError(f"damaged checkpoint: {found[0]}")


def read_record(path: Path) -> dict[str, Any]:
    """Return state.json of a checkpoint. Raises UserError if it is none, or of another format."""
    try:
        record = json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: not a checkpoint: {error}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: not a checkpoint: state.json holds no object")
    if record.get("format") not in (1, FORMAT):
        raise UserError(f"{path}: checkpoint format {record.get('format')}, this version reads {FORMAT}")
    return record


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file that survives a power cut."""
    path.write_text(json.dumps(value, indent=1))
    sync(path)


def sync(path: Path) -> None:
    """Make the file or folder survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def superfluous(
    steps: Iterable[int], *, keep_last: int, keep_every: int | None, best: int | None
) -> list[int]:
    """Return the steps whose checkpoints may go: not among the newest, no multiple, not the best."""
    old = sorted(steps)[:-keep_last]
    return [step for step in old if step != best and not (keep_every and step % keep_every == 0)]
