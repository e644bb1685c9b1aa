"""Writing checkpoints: by all ranks together, behind training if asked, complete or not at all.

Everything is written into ``.tmp-step-...`` and renamed once all ranks are done, so a folder called
``step-...`` is complete. Ranks agree on the outcome of every part of a save: what fails on one raises
UserError on all, and earlier checkpoints stay as they are.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, TypeVar

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer import manifest
from trainer.checkpoint import Contents, write_files
from trainer.collectives import from_all, from_main
from trainer.errors import UserError
from trainer.manifest import (
    PREFIX,
    REPLACED,
    TEMPORARY,
    Entry,
    complete_checkpoints,
    read_record,
    step_of,
    sync,
)

T = TypeVar("T")


@dataclass
class _Save:
    """A save in flight: first a thread of each rank writes its files, then one of rank 0 completes it."""

    step: int
    final: Path
    temporary: Path
    job: Future[dict[str, Entry]]
    is_written: bool = False


class Checkpoints:
    """The checkpoints of one run folder. Every rank of ``group`` must make the same calls."""

    def __init__(
        self,
        folder: Path,
        keep_last: int,
        group: ProcessGroup,
        *,
        keep_every: int | None = None,
        keep_best: str | None = None,
        best_is: str = "highest",
    ) -> None:
        self.folder, self.keep_last, self.group = folder, keep_last, group
        self.keep_every, self.keep_best, self.best_is = keep_every, keep_best, best_is
        self._is_main = group.rank() == 0
        self._lock: IO[str] | None = None
        self._in_flight: _Save | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._at_once = ThreadPoolExecutor(1, "checkpoint")
        self._behind = ThreadPoolExecutor(1, "checkpoint", _give_way)
        self._thread = self._at_once

    def claim(self) -> None:
        """Make sure that no other run saves here until this process ends. Raises UserError on every rank.

        A run whose launcher has died may still be at work when it is started again.
        """

        def lock() -> None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock = (self.folder / ".lock").open("a")
            try:
                fcntl.lockf(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # workers do not inherit it
            except OSError as error:
                if error.errno in (errno.EACCES, errno.EAGAIN):
                    raise
                manifest.log.warning(
                    "%s: cannot be locked (%s): start no second run here", self.folder, error
                )

        what = f"{self.folder}: another process is training in this folder"
        self._agree(what, lambda: lock() if self._is_main else None)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, the same on every rank: rank 0 looks and tells."""
        found = self.all()
        return found[-1] if found else None

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first, the same on every rank."""
        found = complete_checkpoints(self.folder) if self._is_main else []
        return from_main(found, self.group)

    def damage(self, path: Path) -> list[str]:
        """Return what is wrong with a checkpoint's files, one line each; ranks share the reading."""
        own = manifest.damage(path, self.group.rank(), self.group.size())
        return sorted({line for lines in from_all(own, self.group) for line in lines})

    def save(self, contents: Contents) -> Path:
        """Write a checkpoint and drop those that need not be kept; return its folder on every rank.

        Raises UserError on every rank if one could not write; earlier checkpoints are untouched.
        """
        self.finish()
        self._begin(contents, self._at_once)
        path = self.finish()
        assert path is not None
        return path

    def start(self, contents: Contents) -> None:
        """Begin what ``save`` does and return while a thread writes a copy; ``proceed`` ends it.

        A save in flight is finished first, so there is one copy: it stays allocated for the next save.
        """
        self.finish()
        self._begin(self.copied(contents), self._behind)

    def copied(self, contents: Contents) -> Contents:
        """Return the same in memory that lasts until the next call overwrites it.

        Getting the memory costs more than copying: call it once before training, and no save has to.
        """
        backbone = self._copies_of(contents.backbone, "backbone") if self._is_main else {}
        return replace(contents, head=self._copies_of(contents.head, "head"), backbone=backbone)

    def _copies_of(self, tensors: dict[str, Tensor], part: str) -> dict[str, Tensor]:
        copies = self._copies.setdefault(part, {})
        for name, tensor in tensors.items():
            if name not in copies:
                is_pinned = tensor.device.type != "cpu"
                copies[name] = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=is_pinned)
            copies[name].copy_(tensor)
        return {name: copies[name] for name in tensors}

    def _begin(self, contents: Contents, thread: ThreadPoolExecutor) -> None:
        """Prepare the folder and let the thread write this rank's files."""
        final = self.folder / f"{PREFIX}{contents.step:08d}"
        temporary = self.folder / f"{TEMPORARY}{contents.step:08d}"
        tensors = [*contents.head.values(), *(contents.backbone.values() if self._is_main else ())]
        needed_bytes = sum(from_all(sum(tensor.nbytes for tensor in tensors), self.group))
        what = self._failed(contents.step)
        self._agree(what, lambda: self._make_room(temporary, needed_bytes) if self._is_main else None)
        job = thread.submit(write_files, temporary, contents, self.group.rank())
        self._in_flight = _Save(contents.step, final, temporary, job)
        self._thread = thread

    @property
    def is_writing(self) -> bool:
        """True while a thread of this rank is at work: until then ``proceed`` would wait."""
        return self._in_flight is not None and not self._in_flight.job.done()

    def proceed(self) -> Path | None:
        """Take up a save in flight where the threads have left it, or will; return it once it is complete.

        Every rank must call it, best when none of them ``is_writing``. Raises UserError on every rank if one
        could not write.
        """
        if self._in_flight is None:
            return None
        save, self._in_flight = self._in_flight, None
        try:
            parts = self._agree(self._failed(save.step), save.job.result)
        except UserError:
            if self._is_main:
                shutil.rmtree(save.temporary, ignore_errors=True)  # it may be what fills the disk
            raise
        if save.is_written:
            manifest.log.info("saved %s", save.final)
            return save.final
        entries = {name: entry for part in parts for name, entry in part.items()} if self._is_main else {}
        save.job = self._thread.submit(self._complete, save, entries)
        save.is_written, self._in_flight = True, save
        return None

    def finish(self) -> Path | None:
        """Wait until a save in flight is complete and return it; None if none was begun.

        Every rank must call it. Raises UserError on every rank if one could not write.
        """
        path = None
        while self._in_flight is not None:
            path = self.proceed()
        return path

    def set_aside(self, paths: Sequence[Path], folder: str) -> Path:
        """Move checkpoints to a new ``folder`` beside them, and return it: kept, but no longer found."""

        def move() -> Path:
            place, number = self.folder / folder, 1
            while place.exists():
                number += 1
                place = self.folder / f"{folder}-{number}"
            place.mkdir()
            for path in paths:
                path.rename(place / path.name)
                manifest.log.warning("%s: kept as %s", path, place / path.name)
            sync(self.folder)
            return place

        what = f"{self.folder}: cannot set checkpoints aside"
        return self._agree(what, lambda: move() if self._is_main else Path())[0]

    def _failed(self, step: int) -> str:
        return (
            f"{self.folder}: the checkpoint of step {step} could not be written, earlier ones are untouched"
        )

    def _agree(self, what: str, work: Callable[[], T]) -> list[T]:
        """Return what ``work`` gave on each rank. Raises UserError on all of them if it failed on one."""
        outcome: tuple[T | None, str] = (None, "")
        try:
            outcome = (work(), "")
        except (OSError, UserError) as error:
            outcome = (None, str(error))
        outcomes = from_all(outcome, self.group)
        failures = [f"rank {rank}: {message}" for rank, (_, message) in enumerate(outcomes) if message]
        if failures:
            raise UserError(f"{what}: {'; '.join(failures)}")
        return [result for result, _ in outcomes]  # type: ignore[misc]

    def _make_room(self, temporary: Path, needed_bytes: int) -> None:
        """Remove what broken saves left, and make the folder to write to if the disk has room for it."""
        self.folder.mkdir(parents=True, exist_ok=True)
        manifest.remove_rubbish(self.folder)
        free_bytes = shutil.disk_usage(self.folder).free
        if needed_bytes > free_bytes:
            raise OSError(errno.ENOSPC, f"it needs {needed_bytes} bytes, {free_bytes} are free")
        temporary.mkdir()

    def _complete(self, save: _Save, entries: dict[str, Entry]) -> dict[str, Entry]:
        """Write the manifest, give the folder its name, drop what need not be kept; rank 0 alone."""
        if not self._is_main:
            return {}
        manifest.write_manifest(save.temporary, entries)
        replaced = self.folder / f"{REPLACED}{save.step:08d}"
        if save.final.exists():
            save.final.rename(replaced)
        save.temporary.rename(save.final)
        sync(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)
        complete = {step_of(path): path for path in complete_checkpoints(self.folder)}
        best = self._best(complete)
        for step in manifest.superfluous(
            complete, keep_last=self.keep_last, keep_every=self.keep_every, best=best
        ):
            # Under another name first: a removal that is interrupted leaves no half checkpoint.
            rubbish = self.folder / f"{TEMPORARY}{step:08d}"
            complete[step].rename(rubbish)
            shutil.rmtree(rubbish)
        return {}

    def _best(self, complete: dict[int, Path]) -> int | None:
        """Return the step whose record has the best value of ``keep_best``, the newest of equals.

        A record that cannot be read is passed over aloud: it must not end the saves of a run that goes on.
        """
        if self.keep_best is None:
            return None
        values = {}
        for step, path in complete.items():
            try:
                value = read_record(path).get("metrics", {}).get(self.keep_best)
            except UserError as error:
                manifest.log.warning("checkpoint.keep_best: passed over: %s", error)
                continue
            if value is not None and value == value:
                values[step] = value if self.best_is == "highest" else -value
        return max(values, key=lambda step: (values[step], step), default=None)


def _give_way() -> None:
    """Let everything else have the processor before this thread."""
    os.nice(10)
