"""Writing checkpoints: by all ranks together, behind training if asked, complete or not at all.

Everything is written into ``.tmp-step-...`` and renamed once all ranks are done, so a folder called
``step-...`` is complete. Ranks agree on the outcome of every part of a save: what fails on one raises
UserError on all, and earlier checkpoints stay as they are.
"""

import errno
import fcntl
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed import ProcessGroup

from trainer import manifest
from trainer.collectives import from_all, from_main
from trainer.errors import UserError
from trainer.head import ClassShard
from trainer.manifest import (
    FORMAT,
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
class _Writing:
    """A save in flight: a thread of each rank writes this rank's files."""

    step: int
    record: dict[str, Any]
    final: Path
    temporary: Path
    job: Future[dict[str, Entry]]


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
        self._writing: _Writing | None = None
        self._lock: IO[str] | None = None
        self._copies: dict[str, dict[str, Tensor]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

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
        self._agree(what, lambda: lock() if self.group.rank() == 0 else None)

    def newest(self) -> Path | None:
        """Return the newest complete checkpoint, the same on every rank: rank 0 looks and tells."""
        found = self.all()
        return found[-1] if found else None

    def all(self) -> list[Path]:
        """Return the complete checkpoints, oldest first, the same on every rank."""
        found = complete_checkpoints(self.folder) if self.group.rank() == 0 else []
        return from_main(found, self.group)

    def damage(self, path: Path) -> list[str]:
        """Return what is wrong with a checkpoint's files, one line each; ranks share the reading."""
        own = manifest.damage(path, self.group.rank(), self.group.size())
        return sorted({line for lines in from_all(own, self.group) for line in lines})

    def save(
        self,
        step: int,
        record: dict[str, Any],
        backbone: dict[str, Tensor],
        head: dict[str, Tensor],
        shard: ClassShard,
        class_names: Sequence[str] = (),
    ) -> Path:
        """Write one checkpoint and drop those that need not be kept; return its folder on every rank.

        Rank 0 writes ``record`` as state.json, ``class_names`` and ``backbone``; every rank its own rows,
        ``head``. Raises UserError on every rank if one could not write; earlier checkpoints are untouched.
        """
        self.finish()
        self._begin(step, record, backbone, head, shard, class_names)
        path = self.finish()
        assert path is not None
        return path

    def start(
        self,
        step: int,
        record: dict[str, Any],
        backbone: dict[str, Tensor],
        head: dict[str, Tensor],
        shard: ClassShard,
        class_names: Sequence[str] = (),
    ) -> None:
        """Begin what ``save`` does and return while a thread writes a copy; ``finish`` ends it.

        A save in flight is finished first, so there is one copy: it stays allocated for the next save.
        """
        self.finish()
        backbone = self._copied("backbone", backbone) if self.group.rank() == 0 else {}
        self._begin(step, record, backbone, self._copied("head", head), shard, class_names)

    def _copied(self, part: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the tensors in this object's own memory; fresh pages every time would double the pause."""
        copies = self._copies.setdefault(part, {})
        for name, tensor in tensors.items():
            if name not in copies:
                copies[name] = torch.empty_like(tensor, device="cpu")
            copies[name].copy_(tensor)
        return {name: copies[name] for name in tensors}

    def _begin(
        self,
        step: int,
        record: dict[str, Any],
        backbone: dict[str, Tensor],
        head: dict[str, Tensor],
        shard: ClassShard,
        class_names: Sequence[str],
    ) -> None:
        """Prepare the folder and let the thread write this rank's files."""
        record = {"format": FORMAT, "step": step, **record}
        final = self.folder / f"{PREFIX}{step:08d}"
        temporary = self.folder / f"{TEMPORARY}{step:08d}"
        is_main = self.group.rank() == 0
        tensors = [*head.values(), *(backbone.values() if is_main else ())]
        needed_bytes = sum(from_all(sum(tensor.nbytes for tensor in tensors), self.group))
        self._agree(self._failed(step), lambda: self._make_room(temporary, needed_bytes) if is_main else None)

        def write() -> dict[str, Entry]:
            rank_file = temporary / f"head-{self.group.rank():05d}.safetensors"
            rows = {"start": shard.start, "stop": shard.stop, "num_classes": shard.num_classes}
            _write_tensors(rank_file, head, {key: str(value) for key, value in rows.items()})
            written = [rank_file]
            if is_main:
                _write_tensors(temporary / "backbone.safetensors", backbone, {})
                manifest.write_json(temporary / "state.json", record)
                manifest.write_json(temporary / "classes.json", list(class_names))
                written = [*temporary.glob("*.json"), temporary / "backbone.safetensors", rank_file]
            return {path.name: manifest.entry_of(path) for path in written}

        self._writing = _Writing(step, record, final, temporary, self._thread.submit(write))

    @property
    def is_writing(self) -> bool:
        """True while this rank's thread has not written all of it."""
        return self._writing is not None and not self._writing.job.done()

    def finish(self) -> Path | None:
        """Wait until all ranks have written, complete the checkpoint and return it; None if none was begun.

        Raises UserError on every rank if one could not write.
        """
        if self._writing is None:
            return None
        writing, self._writing = self._writing, None
        is_main = self.group.rank() == 0
        try:
            parts = self._agree(self._failed(writing.step), writing.job.result)
            entries = {name: entry for part in parts for name, entry in part.items()}
            self._agree(
                self._failed(writing.step), lambda: self._complete(writing, entries) if is_main else None
            )
        except UserError:
            if is_main:
                shutil.rmtree(writing.temporary, ignore_errors=True)  # it may be what fills the disk
            raise
        manifest.log.info("saved %s", writing.final)
        return writing.final

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
        return self._agree(what, lambda: move() if self.group.rank() == 0 else Path())[0]

    def _failed(self, step: int) -> str:
        return (
            f"{self.folder}: the checkpoint of step {step} could not be written, earlier ones are untouched"
        )

    def _agree(self, what: str, work: Callable[[], T]) -> list[T]:
        """Return what ``work`` gave on each rank. Raises UserError on all of them if it failed on one."""
        outcome: tuple[T | None, str] = (None, "")
        try:
            outcome = (work(), "")
        except (OSError, SafetensorError) as error:
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

    def _complete(self, writing: _Writing, entries: dict[str, Entry]) -> None:
        """Write the manifest, give the folder its name, drop what need not be kept."""
        manifest.write_manifest(writing.temporary, entries)
        replaced = self.folder / f"{REPLACED}{writing.step:08d}"
        if writing.final.exists():
            writing.final.rename(replaced)
        writing.temporary.rename(writing.final)
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

    def _best(self, complete: dict[int, Path]) -> int | None:
        """Return the step whose record has the best value of ``keep_best``, the newest of equals."""
        if self.keep_best is None:
            return None
        values = {}
        for step, path in complete.items():
            value = read_record(path).get("metrics", {}).get(self.keep_best)
            if value is not None and value == value:
                values[step] = value if self.best_is == "highest" else -value
        return max(values, key=lambda step: (values[step], step), default=None)


def _write_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata)
    sync(path)
