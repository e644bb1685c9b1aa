"""The one door to DeepSpeed: its configuration is derived here, its engine built, its state read and set.

The engine holds the backbone only. The head stands outside (``trainer/joint.py`` makes the two one step):
DeepSpeed would broadcast and average its rows, which are different classes on every rank.
"""

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

if not torch.accelerator.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # else the import below warns that it found no GPU
import deepspeed
import deepspeed.ops

from trainer.backbone import Backbone
from trainer.config import Config
from trainer.distributed import World, bound_all_groups
from trainer.errors import UserError
from trainer.optimizer import (
    allocate_state,
    build_optimizer,
    parameter_groups,
    set_steps_taken,
    state_keys,
    steps_taken,
)

# DeepSpeed ignores keys of its top level that it does not know. These it knows, and changing them cannot
# contradict what Config already says (batch sizes, precision, clipping, optimizer).
OVERRIDABLE = frozenset(
    {
        "activation_checkpointing", "aio", "comms_logger", "communication_data_type", "compile",
        "csv_monitor", "data_types", "disable_allgather", "dump_state", "flops_profiler", "fp16",
        "memory_breakdown", "steps_per_print", "tensorboard", "torch_autocast", "wall_clock_breakdown",
        "zero_optimization",
    }
)  # fmt: skip

_LOSS_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def compute_dtype(config: Config, world: World) -> str:
    """Return the backbone's compute type: the configured one, with "auto" decided for this device."""
    if config.engine.dtype != "auto":
        return config.engine.dtype
    return "bfloat16" if world.has_bfloat16 else "float32"


def deepspeed_config(config: Config, world: World) -> dict[str, Any]:
    """Derive DeepSpeed's dictionary. Raises UserError for overrides that DeepSpeed would ignore."""
    micro_batch, rest = divmod(config.data.batch_size, world.size * config.engine.accumulation_steps)
    if rest:
        raise UserError(
            f"data.batch_size: {config.data.batch_size} is not divisible by {world.size} ranks x "
            f"engine.accumulation_steps={config.engine.accumulation_steps}"
        )
    dtype = compute_dtype(config, world)
    derived: dict[str, Any] = {
        "train_batch_size": config.data.batch_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": config.engine.accumulation_steps,
        "zero_optimization": {"stage": config.engine.zero_stage},
        "zero_allow_untested_optimizer": True,  # SGD
        "zero_force_ds_cpu_optimizer": False,
        # Under ZeRO it clips by the norm that trainer/joint.py completes with the head's; at stage 0 that
        # file clips by itself, since DeepSpeed would look at the backbone alone.
        "gradient_clipping": (config.optim.clip_norm or 0.0) if config.engine.zero_stage else 0.0,
        "wall_clock_breakdown": config.engine.wall_clock_breakdown,
        "steps_per_print": 10**9,
    }
    if dtype == "bfloat16":
        # Parameters stay float32; the `bf16` block would round the initial (pretrained) weights first.
        derived["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
    elif dtype == "float16":
        derived["fp16"] = {"enabled": True}
        # By itself it leaves buffers float32, and batch norm refuses half weights beside float statistics.
        derived["data_types"] = {"buffer_dtype": "fp16"}
    for key, value in config.engine.deepspeed_overrides.items():
        if key not in OVERRIDABLE:
            raise UserError(
                f"engine.deepspeed_overrides.{key}: not a key that may be changed; "
                f"these may: {', '.join(sorted(OVERRIDABLE))}"
            )
        nested = isinstance(value, dict) and isinstance(derived.get(key), dict)
        derived[key] = {**derived[key], **value} if nested else value
    return derived


def build_engine(config: Config, backbone: Backbone, world: World) -> Any:
    """Hand the backbone to DeepSpeed; every rank must call it, rank 0's weights reach all.

    Optimizer state is allocated, and every process group has the configured timeout.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # On CPU DeepSpeed compiles an operator only inference needs (30 s, fails without a compiler, leaves
    # 69 MB per rank in /dev/shm). It asks this table first.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    optimizer = build_optimizer(config.optim, parameter_groups(backbone, config.optim.weight_decay))
    engine, *_ = deepspeed.initialize(
        model=backbone.to(world.device), optimizer=optimizer, config=deepspeed_config(config, world)
    )
    allocate_state(_torch_optimizer(engine))
    if _is_zero(engine):
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    elif world.size == 1:
        engine.enable_backward_allreduce = False  # one rank's gradients are their own average
    bound_all_groups(config.engine.timeout_seconds)
    return engine


def state_tensors(engine: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, full float32 tensor on CPU) of parameters, buffers and optimizer state.

    Every rank must go through all of it (ZeRO's parts are summed over ranks) and gets the same tensors.
    """
    optimizer = _torch_optimizer(engine)
    for name, parameter in engine.module.named_parameters():
        if _is_zero(engine):
            yield f"parameter.{name}", parameter.get_full_hp_param().cpu()
        else:
            yield f"parameter.{name}", parameter.detach().cpu()
        for key in state_keys(optimizer):
            if _is_zero(engine):
                yield f"optimizer.{key}.{name}", parameter.get_full_hp_param(optim_state_key=key).cpu()
            else:
                yield f"optimizer.{key}.{name}", optimizer.state[parameter][key].detach().cpu()
    for name, buffer in engine.module.state_dict(keep_vars=True).items():
        if not isinstance(buffer, torch.nn.Parameter):
            yield f"buffer.{name}", buffer.detach().cpu()


def state_numbers(engine: Any) -> dict[str, float]:
    """Return the optimizer's step count and, in float16, the loss scaler; the same on every rank."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    numbers = {name: getattr(scaler, name) for name in _LOSS_SCALER if hasattr(scaler, name)}
    return {"optimizer_steps": steps_taken(_torch_optimizer(engine)), **numbers}


@torch.no_grad()
def load_state(engine: Any, tensors: dict[str, Tensor], numbers: dict[str, float], source: Path) -> None:
    """Restore ``state_tensors`` and ``state_numbers``; each rank sets its own part, nothing is sent.

    Raises UserError, before anything is changed, if names or shapes are not those of this backbone.
    """
    expected = _state_shapes(engine)
    for name in sorted(expected.keys() | tensors.keys()):
        found = tensors[name].shape if name in tensors else None
        if found != expected.get(name):
            raise UserError(
                f"{source}: checkpoint of another model: {name} is {_shape(found)} there "
                f"and {_shape(expected.get(name))} here"
            )
    for name, value in tensors.items():
        _load_tensor(engine, name, value.to(engine.device))
    set_steps_taken(_torch_optimizer(engine), int(numbers["optimizer_steps"]))
    for name in _LOSS_SCALER:
        if name in numbers:
            setattr(engine.optimizer.loss_scaler, name, numbers[name])


@torch.no_grad()
def set_weights(engine: Any, weights: dict[str, Tensor]) -> None:
    """Set parameters and buffers by their names in the module; the optimizer keeps its state."""
    parameters = {name for name, _ in engine.module.named_parameters()}
    for name, value in weights.items():
        _load_tensor(
            engine, f"{'parameter' if name in parameters else 'buffer'}.{name}", value.to(engine.device)
        )


def _state_shapes(engine: Any) -> dict[str, torch.Size]:
    """Return the names and shapes that ``state_tensors`` yields, without communicating."""
    shapes = {}
    for name, value in engine.module.state_dict(keep_vars=True).items():
        if isinstance(value, torch.nn.Parameter):
            shapes[f"parameter.{name}"] = value.shape
            shapes |= {f"optimizer.{key}.{name}": value.shape for key in state_keys(_torch_optimizer(engine))}
        else:
            shapes[f"buffer.{name}"] = value.shape
    return shapes


def _load_tensor(engine: Any, name: str, value: Tensor) -> None:
    kind, _, rest = name.partition(".")
    if kind == "buffer":
        engine.module.get_buffer(rest).copy_(value)
        return
    key, _, parameter_name = rest.partition(".") if kind == "optimizer" else (None, "", rest)
    parameter = engine.module.get_parameter(parameter_name)
    if _is_zero(engine):
        parameter.set_full_hp_param(value, optim_state_key=key)
    elif key is not None:
        _torch_optimizer(engine).state[parameter][key].copy_(value)
    if key is None:
        parameter.copy_(value)


def _shape(size: torch.Size | None) -> str:
    return "missing" if size is None else str(list(size))


def _is_zero(engine: Any) -> bool:
    return bool(engine.zero_optimization())


def _torch_optimizer(engine: Any) -> torch.optim.Optimizer:
    """Return torch's optimizer inside ZeRO's, or the engine's own."""
    return engine.optimizer.optimizer if _is_zero(engine) else engine.optimizer
