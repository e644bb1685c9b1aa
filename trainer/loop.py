"""A run from configuration to result: ``train()`` on one screen."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from trainer.collectives import start_max_over, sum_over
from trainer.config import Config
from trainer.data import Batch
from trainer.diagnostics import HeadView, view_head
from trainer.distributed import World, joined_world, require_host_memory
from trainer.evaluate import EvalSets, SetResult, figures_of
from trainer.feed import (
    TrainingData,
    build_batches,
    open_training_data,
    require_agreement,
    require_same_data,
    with_derived_fields,
)
from trainer.health import require_equal_weights
from trainer.joint import StepOutput
from trainer.log import RunLog, Throughput, log
from trainer.pictures import Frame
from trainer.report import figures_of_head, tables_of_head, write_report
from trainer.resume import resume
from trainer.saving import Checkpoints
from trainer.sheet import as_text, run_sheet
from trainer.signals import StopRequest
from trainer.state import TrainState, build_state, contents_of, loss_statistics, save, share_statistics
from trainer.update import build_update, learning_rate
from trainer.warm_start import warm_start


def train(config: Config) -> dict[str, float]:
    """Train from ``config``, going on from the run's newest checkpoint; return the final test metrics.

    Told to stop by a signal it saves and returns ``stopped_at_step`` instead. Every rank must call it. Raises
    UserError for what the user can mend, and what ``trainer/health.py`` finds.
    """
    with StopRequest() as stop, joined_world(config.engine.timeout_seconds) as world:
        data = open_training_data(config)
        config = with_derived_fields(config, data)
        require_same_data(config, data, world)
        checkpoints = build_checkpoints(config, world)
        state = first_state(config, data, checkpoints, world)
        test_sets = EvalSets(config, world, data.class_names, state.head.shard.num_classes)
        update = build_update(state, config, data, world)
        batches = build_batches(config, data, world, state.position)

        with closing(batches), RunLog(config, is_main=world.is_main, start_step=state.step) as log_run:
            log_run.class_names(data.class_names)
            log_run.sheet(as_text(run_sheet(config, world, data, state.head, state.step)))
            throughput, judgement, is_stopping = Throughput(config.data.batch_size), None, False
            while state.step < log_run.total_steps and not is_stopping:
                world.at(state.step + 1, "waiting for data")
                with throughput.waiting():
                    batch, position = next(batches)
                wishes = start_max_over(wishes_of(stop, checkpoints, world), world.group)

                world.at(state.step + 1, "training")
                lr = learning_rate(config, state.step)
                out = update(batch, lr)
                state.step, state.position = state.step + 1, position
                is_stopping, is_writing = map(bool, wishes().tolist())

                world.at(state.step, "logging, evaluating or saving")
                is_last = state.step == log_run.total_steps
                if is_last:  # before it is judged: a broken test image must not cost what was trained
                    save(state, config, checkpoints, data)
                    checkpoints.finish()
                if log_run.is_due(state.step, config.log.every_steps):
                    log_run.add(step_metrics(out, lr, state, config) | throughput.read())
                    log_run.add({"perf/memory_gib": world.peak_memory_bytes / 2**30})
                if config.data.log_batch_digest:
                    log_run.add({"data/batch_digest": batch_digest(batch, world)})
                metrics: dict[str, float] = {}
                if log_run.is_due(state.step, config.eval.every_steps) and not is_stopping:
                    judgement = judge(state, test_sets, config, data)
                    metrics = judgement.metrics
                    log_run.add(metrics | judgement.view.metrics)
                    for name, frame in judgement.frames() if config.eval.save_embeddings else ():
                        log_run.embeddings(name, frame, state.step)
                log_run.write(state.step)
                check_weights(state, config)
                if not is_writing:
                    checkpoints.proceed()
                is_due = log_run.is_due(state.step, config.checkpoint.every_steps) or is_stopping
                if is_due and not (is_last and config.checkpoint.keep_best is None):
                    save(state, config, checkpoints, data, metrics)
            checkpoints.finish()
            if is_stopping:
                log.info("told to stop: saved step %d; the same command goes on from there", state.step)
                return {"stopped_at_step": state.step}

            judgement = judgement or judge(state, test_sets, config, data)  # the run was complete before
            if world.is_main:
                show(judgement, config, log_run, state.step)
            log_run.finish(state.step, judgement.metrics)
        return judgement.metrics


@dataclass(frozen=True)
class Judgement:
    """What is known of the model at one step."""

    results: list[SetResult]
    view: HeadView

    @property
    def metrics(self) -> dict[str, float]:
        """All metrics of all test sets."""
        return {name: value for result in self.results for name, value in result.metrics.items()}

    def frames(self) -> Iterator[tuple[str, Frame]]:
        """Yield (name, what its pictures are drawn from) of every test set that has images."""
        view = self.view
        for result in (each for each in self.results if len(each.labels_N)):
            yield (
                result.name,
                Frame(
                    result.embeddings_ND,
                    result.labels_N,
                    result.class_names,
                    view.directions_KD,
                    view.direction_names,
                ),
            )


def first_state(config: Config, data: TrainingData, checkpoints: Checkpoints, world: World) -> TrainState:
    """Return the state that training begins with: resumed, warm or from the seed; every rank must call it."""
    checkpoints.claim()
    state = build_state(config, world)
    resume(state, config, checkpoints, data.fingerprint)
    require_agreement({"checkpoint.resume: the step": str(state.step)}, world.group, world.device)
    if state.step == 0:
        warm_start(state, config, data, world)
    if config.checkpoint.asynchronous:  # the memory of its copies: taken now rather than in training
        contents = contents_of(state, config, data, {})
        require_host_memory(contents.num_bytes, world, "checkpoint.asynchronous: the copy of the state")
        checkpoints.copied(contents)
    return state


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


def wishes_of(stop: StopRequest, checkpoints: Checkpoints, world: World) -> Tensor:
    """Return what all ranks do if one has to: stop, and let the save in flight go on."""
    return torch.tensor([stop.is_asked, checkpoints.is_writing], dtype=torch.int32, device=world.device)


def check_weights(state: TrainState, config: Config) -> None:
    """Compare the backbone's copies if it is time; every rank must call it."""
    every = config.engine.check_weights_every
    if every and state.step % every == 0:
        require_equal_weights(state.engine.module, state.head.group, state.step)


def batch_digest(batch: Batch, world: World) -> str:
    """Return a hash of the global batch's positions, pixels and labels, equal for any number of ranks."""
    assert batch.digests_N is not None
    total = sum_over(batch.digests_N.sum().to(world.device), world.group)
    return f"{int(total) % 2**64:016x}"


def step_metrics(out: StepOutput, lr: float, state: TrainState, config: Config) -> dict[str, Any]:
    """Return what the line of a step tells of its training; every rank must call it."""
    assert config.head.dead_after_steps is not None
    return {
        **{f"train/{name}": value for name, value in out.metrics.items()},
        **{f"train/{name}": value for name, value in loss_statistics(state.head).items()},
        "train/lr": lr,
        "train/grad_norm": out.grad_norm,
        "train/dead_classes": state.head.num_dead(config.head.dead_after_steps),
    }


def judge(state: TrainState, test_sets: EvalSets, config: Config, data: TrainingData) -> Judgement:
    """Judge the model on all test sets, and look into its head; every rank must call it."""
    share_statistics(state)
    state.engine.eval()
    results = list(test_sets.evaluate(state.engine, state.head))
    state.engine.train()
    return Judgement(
        results, view_head(state.head, results, data.class_names, list(config.eval.classification))
    )


def show(judgement: Judgement, config: Config, log_run: RunLog, step: int) -> None:
    """Draw what is known of the finished model, and write its report; one rank calls it.

    The result stands without them: what cannot be drawn is a warning, and launch/report.py tries again.
    """
    results, view = judgement.results, judgement.view
    try:
        for name, figure in (*figures_of(results, config.run_folder.name), *figures_of_head(view)):
            log_run.figure(name, figure, step)
        for name, columns, rows in tables_of_head(view):
            log_run.table(name, columns, rows, step)
        if config.log.report:
            log_run.page(write_report(config.run_folder, config, results, view), step)
    except Exception as error:
        log.warning("pictures and report are incomplete: %s: %s", type(error).__name__, error)
