"""Going on from a checkpoint: which one, whether this run may, and what has changed since."""

import shutil
from pathlib import Path
from typing import Any

from trainer import checkpoint
from trainer.config import Config
from trainer.engine import load_state
from trainer.errors import UserError
from trainer.log import log
from trainer.manifest import MANIFEST, read_record, step_of
from trainer.options import changed_since
from trainer.order import Position
from trainer.saving import Checkpoints
from trainer.state import TrainState, load_loss_statistics

# A checkpoint is of another model, or of other data, if one of these differs.
_IDENTITY = (
    "seed", "backbone.name", "backbone.channels", "backbone.neck", "backbone.embedding_dim", "loss.name",
    "head.num_classes", "head.scale", "head.sub_centroids", "head.optimizer", "optim.name",
)  # fmt: skip

# Fields and sections that may change: they are no part of what is computed, or are changed on purpose.
_FREE = (
    "run", "log", "eval", "checkpoint", "init", "data.train", "data.cache_dir", "data.cache_gib",
    "data.allow_pipe", "data.max_bad_fraction", "data.workers", "data.log_batch_digest", "optim.lr",
    "optim.steps", "optim.epochs", "optim.schedule", "optim.warmup_steps", "optim.final_lr", "engine",
    "head.lr_multiplier", "head.update", "head.cache_mib", "head.side_stream",
    "head.dead_after_steps", "backbone.pretrained",
    "backbone.gradient_checkpointing",
)  # fmt: skip

# These too, but the curve will show it.
_WITH_NOTICE = (
    "data.batch_size", "engine.dtype", "engine.accumulation_steps", "engine.deepspeed_overrides",
    "head.state_dtype", "head.product_dtype",
)  # fmt: skip


def resume(state: TrainState, config: Config, checkpoints: Checkpoints, fingerprint: str) -> None:
    """Restore the state as ``checkpoint.resume`` says; every rank must call it. Raises UserError."""
    path, superseded = choose(config, checkpoints)
    if path is None:
        return
    record = read_record(path)
    check_same_training(path, record, config, fingerprint)
    backbone = checkpoint.read_tensors(path / "backbone.safetensors")
    load_state(state.engine, backbone, record["numbers"], path)
    steps = int(record["numbers"]["optimizer_steps"])
    checkpoint.load_head_rows(state.head, state.head_optimizer, path, state.head.row_shard, steps)
    load_loss_statistics(state.head, record)
    state.step, state.position = record["step"], Position(**record["position"])
    state.started_from = record.get("started_from")
    if config.checkpoint.resume != "auto" and path.resolve() == Path(config.checkpoint.resume).resolve():
        state.started_from = str(path.resolve())
    if superseded:
        keep_curve(config, checkpoints, superseded)
    ranks = record.get("ranks", "?")
    log.info("resumed from %s, written by %s ranks", path, ranks)


def choose(config: Config, checkpoints: Checkpoints) -> tuple[Path | None, list[Path]]:
    """Return the checkpoint to go on from and the newer ones it supersedes, equal on every rank.

    1. "never": none, and the folder must not hold any, since they would be mixed with the new run's;
    2. "auto": the newest that is not damaged; damaged ones are set aside, and if all are it is an error;
    3. a path: that checkpoint, unless the folder's newest goes back to it: then that one, as with "auto".
    Raises UserError.
    """
    asked, found = config.checkpoint.resume, checkpoints.all()
    if asked == "never":
        if found:
            raise UserError(
                f"checkpoint.resume: never, but {found[-1]} exists; choose another run.name or remove it"
            )
        return None, []
    if asked == "auto":
        return newest_undamaged(found, checkpoints), []
    path = Path(asked)
    if found and _started_from(found[-1]) == str(path.resolve()):
        return newest_undamaged(found, checkpoints), []
    require_undamaged(path, checkpoints)
    if found and path.resolve().parent != checkpoints.folder.resolve():
        raise UserError(
            f"checkpoint.resume: {path} is not where {found[-1]} began: the two would mix; "
            "take another run.name"
        )
    return path, [other for other in found if step_of(other) > step_of(path)]


def newest_undamaged(found: list[Path], checkpoints: Checkpoints) -> Path | None:
    """Return the newest checkpoint whose files are as they were written, and set newer ones aside, loudly.

    None if there are none at all. Raises UserError if all are damaged: to start anew must be asked for.
    """
    damaged: list[Path] = []
    for path in reversed(found):
        damage = _damage(path, checkpoints)
        if not damage:
            break
        damaged.append(path)
        for line in damage:
            log.warning("damaged checkpoint: %s", line)
    if damaged and len(damaged) == len(found):
        raise UserError(f"damaged checkpoint: {damage[0]}; no other is left in {checkpoints.folder}")
    if damaged:
        checkpoints.set_aside(damaged, "damaged")
    return found[-1 - len(damaged)] if found else None


def require_undamaged(path: Path, checkpoints: Checkpoints) -> None:
    """Raise UserError, on every rank, naming the first file that is not as it was written."""
    if damage := _damage(path, checkpoints):
        raise UserError(f"damaged checkpoint: {damage[0]}")


def keep_curve(config: Config, checkpoints: Checkpoints, superseded: list[Path]) -> None:
    """Set the checkpoints aside that a run leaves behind by going back, and its metrics with them."""
    place = checkpoints.set_aside(superseded, "superseded")
    metrics = config.run_folder / "metrics.jsonl"
    if checkpoints.group.rank() == 0 and metrics.exists():
        shutil.copy(metrics, place)


def check_same_training(path: Path, record: dict[str, Any], config: Config, fingerprint: str) -> None:
    """Refuse a checkpoint of another model or other data, or one whose training may not be changed so.

    Tells every difference. Raises UserError.
    """
    changed = changed_since(record["config"], config)
    differences = {name: f"{name} was {before!r}, is {now!r}" for name, (before, now) in changed.items()}
    for name in _IDENTITY:
        if name in differences:
            raise UserError(f"{path}: checkpoint of another model: {differences[name]}")
    if record["data_fingerprint"] != fingerprint:
        raise UserError(
            f"{path}: data.train: {config.data.train} is not the data this checkpoint was trained on"
        )
    allowed = (*_FREE, *_WITH_NOTICE, *config.checkpoint.allow_changes)
    refused = [name for name in changed if not _is_among(name, allowed)]
    for name in changed:
        level = log.warning if _is_among(name, _WITH_NOTICE) or name in refused else log.info
        level("changed since the checkpoint: %s", differences[name])
    if refused:
        raise UserError(
            f"{path}: another training: {'; '.join(differences[name] for name in refused)}; "
            f"to allow it: checkpoint.allow_changes=[{','.join(refused)}]"
        )


def _damage(path: Path, checkpoints: Checkpoints) -> list[str]:
    """Return what is wrong with a checkpoint, the same on every rank. Raises UserError if it is none."""
    if not path.is_dir():
        raise UserError(f"{path}: not a checkpoint: there is no such folder")
    if not (path / MANIFEST).exists() and _is_of_format_1(path):
        log.warning("%s: has no checksums (format 1), so it is not verified", path)
        return []
    return checkpoints.damage(path)


def _is_of_format_1(path: Path) -> bool:
    try:
        return read_record(path)["format"] == 1
    except UserError:
        return False


def _started_from(path: Path) -> str | None:
    """Return which checkpoint the run of this one began with, None if it cannot be read."""
    try:
        return read_record(path).get("started_from")
    except UserError:
        return None


def _is_among(name: str, fields: tuple[str, ...]) -> bool:
    return any(name == field or name.startswith(f"{field}.") for field in fields)
