"""The files of a data set, in a folder or in a zip: listed by name, read one by one, never unpacked."""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError
from trainer.folders import walk

MAX_BYTES = 1 << 28  # of one image: a small zip can claim to hold a file that fills the memory


@dataclass(frozen=True)
class Files:
    """The files of one folder or zip, named by their path from its root; hidden ones are not listed."""

    root: Path
    names: list[str]
    read: Callable[[str], bytes]
    """Returns the content of one file; works in forked processes too."""

    @property
    def origins(self) -> list[Path]:
        """The files on disk that these are read from."""
        return [self.root / name for name in self.names] if self.root.is_dir() else [self.root]


def open_files(path: Path) -> Files:
    """List a folder, or a zip."""
    if not path.exists():
        raise UserError(f"{path} does not exist")
    return _folder_files(path) if path.is_dir() else _zip_files(path)


def extension_of(name: str) -> str:
    """Return what follows the last dot, in lower case."""
    return os.path.splitext(name)[1][1:].lower()


def read_file(path: Path | str) -> bytes:
    """Return the content of a file. Raises UserError naming it."""
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError as error:
        raise UserError(f"{path}: cannot read: {error.strerror}") from None


def read_text(path: Path) -> str:
    """Return the text of a file in UTF-8, with or without a mark at its beginning."""
    try:
        return read_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 at byte {error.start}") from None


def _folder_files(root: Path) -> Files:
    names = []
    for folder, _, files in walk(root):
        below = "" if folder == root else f"{folder.relative_to(root).as_posix()}/"
        names += [below + file for file in files]
    return Files(root, names, lambda name: read_file(f"{root}/{name}"))


def _zip_files(path: Path) -> Files:
    archives: dict[int, zipfile.ZipFile] = {}

    def archive() -> zipfile.ZipFile:
        # One for every process: forked ones share the position in the file.
        if os.getpid() not in archives:
            try:
                archives[os.getpid()] = zipfile.ZipFile(path)
            except Exception as error:  # zipfile raises nearly anything on broken bytes
                raise UserError(f"{path}: cannot read as a zip: {error}") from None
        return archives[os.getpid()]

    def read(name: str) -> bytes:
        opened = archive()
        try:
            if opened.getinfo(name).file_size > MAX_BYTES:
                raise ValueError(f"above {MAX_BYTES >> 20} MiB unpacked")
            return opened.read(name)
        except Exception as error:  # zipfile and its decompressors raise nearly anything on broken bytes
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{path}: cannot read {name}: {reason}") from None

    listed = [info.filename for info in archive().infolist() if not info.is_dir()]
    return Files(path, [name for name in listed if not _is_hidden(name)], read)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))
