"""A run from configuration to result: ``train()`` on one screen."""

import dataclasses
import time
from collections.abc import Callable, Generator
from contextlib import closing

import torch
from torch import Tensor

from trainer.augment import build_train_transform
from trainer.backbone import image_size_of
from trainer.collectives import start_max_over, sum_over
from trainer.config import Config
from trainer.data import Batch, build_train_loader
from trainer.distributed import World, joined_world
from trainer.errors import UserError
from trainer.evaluate import EvalSets, SetResult, figures_of
from trainer.health import NonFinite, require_equal_weights, watched
from trainer.index import Index, open_index
from trainer.joint import JointStep, StepOutput
from trainer.log import RunLog, Throughput, log
from trainer.order import Position, epoch_order, fold, rank_positions
from trainer.resume import resume
from trainer.saving import Checkpoints
from trainer.schedule import lr_at
from trainer.sheet import as_text, run_sheet
from trainer.signals import StopRequest
from trainer.state import TrainState, build_state, running_statistics, save, share_statistics


def train(config: Config) -> dict[str, float]:
    """Train from ``config``, going on from the run's newest checkpoint; return the final test metrics.

    Told to stop by a signal it saves and returns ``stopped_at_step`` instead. Every rank must call it. Raises
    UserError for what the user can mend, and what ``trainer/health.py`` finds.
    """
    timeout = config.engine.timeout_seconds
    with StopRequest() as stop, joined_world(timeout) as world, watched(world) as heart:
        index = open_index(config.data.train, "data.train")
        config = with_derived_fields(config, index)
        checkpoints = build_checkpoints(config, world)
        checkpoints.claim()
        state = build_state(config, world)
        resume(state, config, checkpoints, index.fingerprint)
        test_sets = EvalSets(config, world, index.class_names, state.head.shard.num_classes)
        update = build_update(state, config, index, world)
        batches = build_batches(config, index, world, state.position)

        with closing(batches), RunLog(config, is_main=world.is_main, start_step=state.step) as log_run:
            log_run.class_names(index.class_names)
            log_run.sheet(as_text(run_sheet(config, world, index, state.head, state.step)))
            throughput, results, is_stopping = Throughput(), None, False
            while state.step < log_run.total_steps and not is_stopping:
                heart.at(state.step + 1, "waiting for data")
                asked = time.perf_counter()
                batch, position = next(batches)
                throughput.count(config.data.batch_size, waited_seconds=time.perf_counter() - asked)
                wishes = start_max_over(wishes_of(stop, checkpoints, world), world.group)

                heart.at(state.step + 1, "training")
                lr = learning_rate(config, state.step)
                out = update(batch, lr)
                state.step, state.position = state.step + 1, position
                is_stopping, is_writing = map(bool, wishes().tolist())

                heart.at(state.step, "logging, evaluating or saving")
                if log_run.is_due(state.step, config.log.every_steps):
                    log_run.add({f"train/{name}": value for name, value in out.metrics.items()})
                    log_run.add({"train/lr": lr, "train/grad_norm": out.grad_norm, **throughput.read()})
                    log_run.add({"perf/memory_gib": world.peak_memory_bytes / 2**30})
                    log_run.add({"train/dead_classes": dead_classes(state, config)})
                if config.data.log_batch_digest:
                    log_run.add({"data/batch_digest": batch_digest(batch, world)})
                metrics: dict[str, float] = {}
                if log_run.is_due(state.step, config.eval.every_steps) and not is_stopping:
                    results = evaluate(state, test_sets)
                    metrics = metrics_of(results)
                    log_run.add(metrics)
                log_run.write(state.step)
                check_weights(state, config)
                if not is_writing:
                    checkpoints.finish()
                if log_run.is_due(state.step, config.checkpoint.every_steps) or is_stopping:
                    save(state, config, checkpoints, index, metrics)
            checkpoints.finish()
            if is_stopping:
                log.info("told to stop: saved step %d; the same command goes on from there", state.step)
                return {"stopped_at_step": state.step}

            results = results or evaluate(state, test_sets)  # the run may have been complete before
            for name, figure in figures_of(results, config.run_folder.name) if world.is_main else ():
                log_run.figure(name, figure, state.step)
            log_run.finish(state.step, metrics_of(results))
        return metrics_of(results)


def with_derived_fields(config: Config, index: Index) -> Config:
    """Fill in what the data decides: number of classes, number of steps. Raises UserError."""
    num_classes = config.head.num_classes or index.num_classes
    if index.num_classes > num_classes:
        raise UserError(
            f"head.num_classes: is {num_classes}, but data.train has label {index.num_classes - 1} "
            f"({config.data.train})"
        )
    steps_per_epoch = index.num_samples // config.data.batch_size
    if steps_per_epoch == 0:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} is more than the {index.num_samples} images "
            f"of {config.data.train}"
        )
    steps = config.optim.steps or max(1, round(steps_per_epoch * (config.optim.epochs or 0)))
    dead_after = config.head.dead_after_steps or 2 * steps_per_epoch
    return dataclasses.replace(
        config,
        head=dataclasses.replace(config.head, num_classes=num_classes, dead_after_steps=dead_after),
        optim=dataclasses.replace(config.optim, steps=steps, epochs=None),
    )


def build_checkpoints(config: Config, world: World) -> Checkpoints:
    """Build what saves and finds the checkpoints of the run's folder."""
    keep = config.checkpoint
    return Checkpoints(
        config.run_folder / "checkpoints",
        keep.keep_last,
        world.group,
        keep_every=keep.keep_every,
        keep_best=keep.keep_best,
        best_is=keep.best_is,
    )


def build_step(state: TrainState, config: Config, world: World) -> JointStep:
    """Build the function that trains on one batch."""
    return JointStep(
        state.engine,
        state.head,
        state.head_optimizer,
        group=world.group,
        clip_norm=config.optim.clip_norm,
        head_lr_multiplier=config.head.lr_multiplier,
        side_stream=config.head.side_stream,
    )


def build_update(
    state: TrainState, config: Config, index: Index, world: World
) -> Callable[[Batch, float], StepOutput]:
    """Build ``build_step`` in what every step needs: its randomness, and an eye on its numbers."""
    step_of, engine = build_step(state, config, world), config.engine
    guard = NonFinite(
        engine.on_nonfinite, engine.max_skipped_steps, config.run_folder / "nonfinite", world.group
    )

    def update(batch: Batch, lr: float) -> StepOutput:
        # Dropout draws from this: the same after a resume.
        torch.manual_seed(fold(config.seed, state.step, world.rank))
        guard.before_step([*state.engine.module.buffers(), *running_statistics(state.head)])
        out = step_of(batch.images_NCHW.to(world.device), batch.labels_N.to(world.device), lr, state.step)
        if is_finite(out, config):
            guard.passed()
            return out
        what = f"loss {float(out.metrics['loss'])}, gradient norm {out.grad_norm}"
        tensors = {"images_NCHW": batch.images_NCHW, "labels_N": batch.labels_N}
        samples = samples_of_step(config, index, world, state.position)
        guard.failed(state.step + 1, what, tensors | {"embeddings_ND": out.embeddings_ND}, samples)
        return out

    return update


def samples_of_step(config: Config, index: Index, world: World, position: Position) -> list[str]:
    """Return where the images lie that this rank trains on in the step from ``position`` on."""
    batch_size = config.data.batch_size
    position = position.normalised(batch_size, index.num_samples)
    order = epoch_order(index.num_samples, config.seed, position.epoch)
    own = rank_positions(
        position.consumed,
        global_batch=batch_size,
        accumulation=config.engine.accumulation_steps,
        rank=world.rank,
        world_size=world.size,
    )
    return [index.describe(int(sample)) for sample in order[own]]


def wishes_of(stop: StopRequest, checkpoints: Checkpoints, world: World) -> torch.Tensor:
    """Return what all ranks do if one has to: stop, and let the save in flight go on."""
    return torch.tensor([stop.is_asked, checkpoints.is_writing], dtype=torch.int32, device=world.device)


def check_weights(state: TrainState, config: Config) -> None:
    """Compare the backbone's copies if it is time; every rank must call it."""
    every = config.engine.check_weights_every
    if every and state.step % every == 0:
        require_equal_weights(state.engine.module, state.head.group, state.step)


def build_batches(
    config: Config, index: Index, world: World, start: Position
) -> Generator[tuple[Batch, Position], None, None]:
    """Build the endless iterator over this rank's training batches from ``start`` on."""
    augment = config.augment
    transform = build_train_transform(
        image_size=image_size_of(config.backbone),
        crop_scale=augment.crop_scale,
        flip_probability=augment.flip,
        rotate_degrees=augment.rotate_degrees,
        shift_fraction=augment.shift,
        scale_range=augment.zoom,
        color_jitter=augment.color_jitter,
        erase_probability=augment.erase,
    )
    return build_train_loader(
        index,
        transform,
        channels=config.backbone.channels,
        global_batch=config.data.batch_size,
        accumulation=config.engine.accumulation_steps,
        seed=config.seed,
        rank=world.rank,
        world_size=world.size,
        workers=config.data.workers,
        start=start,
        with_digests=config.data.log_batch_digest,
    )


def learning_rate(config: Config, step: int) -> float:
    """Return the learning rate of step ``step`` (from 0)."""
    optim = config.optim
    assert optim.steps is not None
    return lr_at(
        step,
        peak=optim.lr,
        total_steps=optim.steps,
        warmup_steps=optim.warmup_steps,
        shape=optim.schedule,
        final_fraction=optim.final_lr,
    )


def is_finite(out: StepOutput, config: Config) -> bool:
    """Return whether loss and gradients were numbers, the same on every rank: all see the global ones.

    In float16 a gradient that overflows is skipped by design, and the loss scale lowered.
    """
    overflow = not out.applied and config.engine.dtype != "float16"
    return not overflow and bool(torch.isfinite(out.metrics["loss"]))


def batch_digest(batch: Batch, world: World) -> str:
    """Return a hash of the global batch's positions, pixels and labels, equal for any number of ranks."""
    assert batch.digests_N is not None
    total = sum_over(batch.digests_N.sum().to(world.device), world.group)
    return f"{int(total) % 2**64:016x}"


def dead_classes(state: TrainState, config: Config) -> Tensor:
    """Return how many classes had no sample for long; every rank must call it."""
    assert config.head.dead_after_steps is not None
    return state.head.num_dead(config.head.dead_after_steps)


def evaluate(state: TrainState, test_sets: EvalSets) -> list[SetResult]:
    """Judge the model on all test sets; every rank must call it."""
    share_statistics(state)
    state.engine.eval()
    results = list(test_sets.evaluate(state.engine, state.head))
    state.engine.train()
    return results


def metrics_of(results: list[SetResult]) -> dict[str, float]:
    """Return all metrics of all sets."""
    return {name: value for result in results for name, value in result.metrics.items()}
