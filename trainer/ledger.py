"""Samples that could not be used in training: written down, limited, and skipped when known.

A rank writes ``bad_samples/rank-00000.jsonl`` in the run's folder: one line for every bad sample it meets,
the first time. These files, or a part of their lines, are what ``data.quarantine`` takes. Needs no
communication.
"""

import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from trainer.errors import UserError

log = logging.getLogger("trainer")


class BadSample(NamedTuple):
    """One sample that was replaced, as its line in the ledger says it."""

    shard: str
    offset: int
    """Byte of the shard where the image begins: with the shard's name, what identifies the sample."""
    key: str
    """Name of the member."""
    reason: str
    epoch: int
    position: int
    """Where it was in the order of the epoch."""


class Ledger:
    """Counts and writes the bad samples of one rank. Raises UserError above the limit.

    The limit is on all ranks together, estimated by each: what their ledgers held when the run began or went
    on, and what this rank has met since, times the number of ranks.
    """

    def __init__(
        self, folder: Path, *, rank: int, world_size: int, num_samples: int, max_bad_fraction: float
    ) -> None:
        self._path = folder / f"rank-{rank:05d}.jsonl"
        if self._path.exists():  # what a full disk or a kill has cut short would begin the next line
            os.truncate(self._path, self._path.read_bytes().rfind(b"\n") + 1)
        self._known = {(line["shard"], line["offset"]) for line in _read_all(folder, whole_lines=True)}
        self._at_start, self._world_size = len(self._known), world_size
        self._fraction, self._limit = max_bad_fraction, max_bad_fraction * num_samples

    def add(self, bad: BadSample) -> None:
        """Write a sample down, unless it is known from before (also from before a restart)."""
        if (bad.shard, bad.offset) in self._known:
            return
        self._known.add((bad.shard, bad.offset))
        log.warning("replaced a bad sample: shard %s, sample %s: %s", bad.shard, bad.key, bad.reason)
        self._write(json.dumps(bad._asdict()) + "\n")
        new = len(self._known) - self._at_start
        if self._at_start + new * self._world_size > self._limit:
            raise UserError(
                f"data.max_bad_fraction: more than {self._fraction:g} of the data is bad ({len(self._known)} "
                f"samples so far); the last: shard {bad.shard}, sample {bad.key}: {bad.reason}; "
                f"all of them: {self._path.parent}"
            )

    def _write(self, line: str) -> None:
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="ascii") as file:
                file.write(line)
        except OSError as error:
            raise UserError(f"{self._path}: cannot write: {error.strerror}") from None


def read_quarantine(path: Path, find: Callable[[str, int], int | None]) -> frozenset[int]:
    """Return the samples that the lines of a ledger, or of a folder of ledgers, name. Raises UserError.

    ``find`` is that of the index: from a shard's name and an offset to the sample.
    """
    if not path.exists():
        raise UserError(f"data.quarantine: {path} does not exist")
    samples = []
    for line in _read_all(path) if path.is_dir() else _read_lines(path):
        sample = find(line["shard"], line["offset"])
        if sample is None:
            raise UserError(
                f"data.quarantine: {path} is of other data: there is no sample at byte {line['offset']} of "
                f"shard {line['shard']}"
            )
        samples.append(sample)
    return frozenset(samples)


def _read_all(folder: Path, whole_lines: bool = False) -> list[dict[str, Any]]:
    return [line for path in sorted(folder.glob("*.jsonl")) for line in _read_lines(path, whole_lines)]


def _read_lines(path: Path, whole_lines: bool = False) -> list[dict[str, Any]]:
    """Read a ledger; with ``whole_lines`` not what follows the last newline."""
    lines, content = [], path.read_text(encoding="utf-8", errors="replace")
    content = content[: content.rfind("\n") + 1] if whole_lines else content
    for number, text in enumerate(content.splitlines(), start=1):
        try:
            line = json.loads(text)
            lines.append({"shard": str(line["shard"]), "offset": int(line["offset"])})
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{path}: line {number} does not name shard and offset as JSON") from None
    return lines
