"""Tables of images: CSV files of paths, Parquet files of paths or of the images themselves."""

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.sources.files import extension_of, read_file, read_text
from trainer.sources.pictures import is_image, packable, sniffed
from trainer.sources.source import Source


def csv_sets(path: Path, root: Path | None = None) -> dict[str, Source]:
    """Return the sets of a CSV file with the columns path and label: one named "", or one per value of split.

    Paths are taken from ``root``, by default the folder of the CSV file. Other columns are ignored. Raises
    UserError naming the line of a row that is incomplete, or whose file is missing or no image.
    """
    rows = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
    folder = path.parent if root is None else root
    by_set: dict[str, list[tuple[Path, str]]] = {}
    try:
        if missing := {"path", "label"} - set(rows.fieldnames or ()):
            raise UserError(f"{path}: no column {min(missing)} in its first line (path,label[,split])")
        for row in rows:
            where = f"{path}:{rows.line_num}"
            if not row["path"] or not row["label"]:
                raise UserError(f"{where}: path or label is empty")
            split = _checked_split(row["split"] or "", where) if "split" in row else ""
            by_set.setdefault(split, []).append((_image_path(folder / row["path"], where), row["label"]))
    except (csv.Error, ValueError) as error:
        raise UserError(f"{path}:{rows.line_num}: {error}") from None
    if not by_set:
        raise UserError(f"{path} holds no rows")
    return {name: _listed(rows_of) for name, rows_of in by_set.items()}


def parquet(path: Path, image_column: str, label_column: str) -> Source:
    """Return the rows of a Parquet file, or of all those of a folder, as one set.

    The image column holds bytes, paths from the file's folder, or a struct of both as Hugging Face writes it,
    whose class names are used. Everything is read into memory: rows of a compressed file have no address.
    """
    files = sorted(path.glob("*.parquet")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .parquet file")
    _check_memory(files)
    images: list[Any] = []
    classes: list[str] = []
    for file in files:
        columns, names = _read_columns(file, image_column, label_column)
        images += columns[0]
        classes += [_class_name(label, names, f"{file}: row {i}") for i, label in enumerate(columns[1])]
    if not classes:
        raise UserError(f"{path} holds no rows")
    folder = files[0].parent
    return Source(classes, lambda i: _cell_image(images[i], folder, f"{path}: row {i}"), files=files)


def _listed(rows: Sequence[tuple[Path, str]]) -> Source:
    paths = [path for path, _ in rows]
    return Source(
        classes=[label for _, label in rows],
        read=lambda i: packable(read_file(paths[i]), extension_of(paths[i].name), str(paths[i])),
        files=paths,
    )


def _checked_split(split: str, where: str) -> str:
    if not split.replace("-", "").replace("_", "").isalnum() or not split.isascii():
        raise UserError(f"{where}: split {split!a} must be letters, digits, - and _: it names a folder")
    return split


def _image_path(path: Path, where: str) -> Path:
    if not is_image(extension_of(path.name)):
        raise UserError(f"{where}: {path.name!a} is not an image (.jpg, .png, .webp, ...)")
    try:
        is_there = path.is_file()
    except OSError as error:
        raise UserError(f"{where}: {path.name[:40]!a}...: {error.strerror}") from None
    if not is_there:
        raise UserError(f"{where}: {ascii(str(path))[1:-1]} does not exist")
    return path


def _check_memory(files: Sequence[Path]) -> None:
    try:
        size = sum(file.stat().st_size for file in files)
    except OSError as error:
        raise UserError(f"{error.filename}: cannot read: {error.strerror}") from None
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if size > memory // 2:
        raise UserError(
            f"{files[0].parent}: {size / 1e9:.1f} GB of Parquet are more than half of this machine's memory;"
            " pack it in parts"
        )


def _read_columns(
    file: Path, image_column: str, label_column: str
) -> tuple[tuple[list[Any], list[Any]], Sequence[str]]:
    """Return the two columns of one file, and the names that stand in its header for the labels, if any."""
    import pyarrow  # here, because it takes half a second that other sources need not spend
    import pyarrow.parquet

    try:
        content = pyarrow.parquet.ParquetFile(file, memory_map=True)
        present = content.schema_arrow.names
        if missing := {image_column, label_column} - set(present):
            raise UserError(f"{file}: no column {min(missing)}; it has {', '.join(present)}")
        table = content.read(columns=[image_column, label_column])
        columns = table[image_column].to_pylist(), table[label_column].to_pylist()
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        raise UserError(f"{file}: cannot read as Parquet: {' '.join(str(error).split())[:200]}") from None
    return columns, _hugging_face_names(table.schema.metadata or {}, label_column)


def _hugging_face_names(metadata: Mapping[bytes, bytes], label_column: str) -> Sequence[str]:
    try:
        names = json.loads(metadata[b"huggingface"])["info"]["features"][label_column]["names"]
    except (KeyError, TypeError, ValueError):
        return ()
    return names if isinstance(names, list) and all(isinstance(name, str) for name in names) else ()


def _class_name(label: Any, names: Sequence[str], where: str) -> str:
    if isinstance(label, str) and label:
        return label
    if isinstance(label, int) and label >= 0 and (not names or label < len(names)):
        return names[label] if names else str(label)
    raise UserError(f"{where}: label {label!a} is neither a name nor the number of a class")


def _cell_image(cell: Any, folder: Path, where: str) -> tuple[bytes, str]:
    if isinstance(cell, dict):
        cell = cell.get("bytes") or cell.get("path")
    if isinstance(cell, bytes):
        return sniffed(cell, where)
    if not isinstance(cell, str):
        raise UserError(f"{where}: the image is neither bytes nor a path")
    path = _image_path(folder / cell, where)
    return packable(read_file(path), extension_of(path.name), str(path))
