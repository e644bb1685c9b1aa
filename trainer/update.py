"""What every step of training has around ``JointStep``: randomness, learning rate, an eye on its numbers."""

from collections.abc import Callable

import torch

from trainer.config import Config
from trainer.data import Batch
from trainer.distributed import World
from trainer.errors import UserError
from trainer.feed import TrainingData
from trainer.health import NonFinite
from trainer.joint import JointStep, StepOutput
from trainer.order import Position, fold, rank_positions
from trainer.schedule import lr_at
from trainer.state import TrainState


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
    state: TrainState, config: Config, data: TrainingData, world: World
) -> Callable[[Batch, float], StepOutput]:
    """Build ``build_step`` in what every step needs: its randomness, and an eye on its numbers.

    Its steps raise UserError where a batch norm has a single number per channel.
    """
    step_of, engine = build_step(state, config, world), config.engine
    guard = NonFinite(
        engine.on_nonfinite, engine.max_skipped_steps, config.run_folder / "nonfinite", world.group
    )

    def update(batch: Batch, lr: float) -> StepOutput:
        # Dropout draws from this: the same after a resume.
        torch.manual_seed(fold(config.seed, state.step, world.rank))
        guard.before_step([*state.engine.module.buffers(), *state.head.statistics().values()])
        try:
            out = step_of(batch.images_NCHW.to(world.device), batch.labels_N.to(world.device), lr, state.step)
        except ValueError as error:
            if len(batch.images_NCHW) > engine.accumulation_steps:
                raise
            raise UserError(f"data.batch_size: a rank has one image at a time: {error}") from error
        if is_finite(out, config):
            guard.passed()
            return out
        what = f"loss {float(out.metrics['loss'])}, gradient norm {out.grad_norm}"
        tensors = {"images_NCHW": batch.images_NCHW, "labels_N": batch.labels_N}
        samples = samples_of_step(config, data, world, state.position)
        guard.failed(state.step + 1, what, tensors | {"embeddings_ND": out.embeddings_ND}, samples)
        return out

    return update


def samples_of_step(config: Config, data: TrainingData, world: World, position: Position) -> list[str]:
    """Return where the images of this rank lie in the step from ``position`` on, if that is known."""
    if data.index is None or data.order is None:
        return []
    position = position.normalised(config.data.batch_size, data.order.num_positions)
    own = rank_positions(
        position.consumed,
        global_batch=config.data.batch_size,
        accumulation=config.engine.accumulation_steps,
        rank=world.rank,
        world_size=world.size,
    )
    return [data.index.describe(int(sample)) for sample in data.order.of_epoch(position.epoch)(own)]


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
