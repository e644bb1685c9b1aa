"""The files below a folder, the same for packing and for judging."""

import os
from collections.abc import Iterator
from pathlib import Path

from trainer.errors import UserError


def walk(root: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield (folder, subfolders, files) below ``root``: sorted, no hidden names, symbolic links followed.

    Raises UserError for a folder that cannot be read, and for a link that would be followed for ever.
    """

    def fail(error: OSError) -> None:
        raise UserError(f"{error.filename}: cannot read: {error.strerror}")

    for name, subfolders, files in os.walk(root, followlinks=True, onerror=fail):
        folder = Path(name)
        subfolders[:] = sorted(s for s in subfolders if not s.startswith("."))
        around = [folder, *(parent for parent in folder.parents if parent.is_relative_to(root))]
        for link in (folder / s for s in subfolders if (folder / s).is_symlink()):
            if link.resolve() in [parent.resolve() for parent in around]:
                raise UserError(f"{link} is a symbolic link to a folder around it")
        yield folder, subfolders, sorted(f for f in files if not f.startswith("."))
