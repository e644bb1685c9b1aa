"""What runs on a device that is not the host gives what it gives there, and leaves nothing behind: GPUs."""

import shutil
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from accelerator import accelerated, on_host
from launching import options
from ranks import run_on_ranks
from small_run import pack_photos
from torch import Tensor, nn

from trainer import collectives, loop, state
from trainer.backbone import Backbone, build_backbone
from trainer.config import UNFUSED, Config
from trainer.diagnostics import view_head
from trainer.distributed import World
from trainer.evaluate import SetResult
from trainer.margins import MARGINS
from trainer.optimizer import allocate_state, build_optimizer, parameter_groups
from trainer.options import load

NUM_CLASSES, DIM, IMAGES = 11, 8, 4
BACKBONES = ("resnet10t", "lenetpp", "preact_resnet")
CASES = {
    **{name: (f"loss.name={name}",) for name in (*MARGINS, *sorted(UNFUSED))},
    **{
        mining: ("loss.name=triplet", f"loss.triplet.mining={mining}")
        for mining in ("all", "random_violating", "batch_hard", "semi_hard")
    },
    **{
        inter: ("loss.name=standalone_center", f"loss.standalone_center.inter={inter}")
        for inter in ("centres", "classifier")
    },
    "autograd": ("head.update=autograd",),
    "sub-centroids": ("head.sub_centroids=3",),
    "sampled": ("head.sample_rate=0.5",),
    "bfloat16": ("head.state_dtype=bfloat16",),
    "row-wise": ("head.optimizer=row_adagrad",),
    "label smoothing": ("loss.label_smoothing=0.1",),
    "sum": ("loss.extra={triplet: 0.1, softmax: 1}",),
}


def config_of(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "base.yaml"
    path.write_text(
        f"data: {{train: none}}\nhead: {{num_classes: {NUM_CLASSES}}}\noptim: {{steps: 1}}\n"
        "backbone: {image_size: 32}\n"
    )
    return load(path, overrides)


def batch(world: World) -> tuple[Tensor, Tensor]:
    """Return this rank's images."""
    generator = torch.Generator().manual_seed(world.rank)
    embeddings_ND = torch.randn(IMAGES, DIM, generator=generator).to(world.device)
    return embeddings_ND, torch.tensor([0, 5, 9, 5], device=world.device)


def step(world: World, config: Config) -> list[Tensor]:
    """Return what comes of a step, and of judging the head that it leaves."""
    head = state.build_head(config, world, DIM)
    name = None if config.head.optimizer == "same" else config.head.optimizer
    head_optimizer = build_optimizer(config.optim, parameter_groups(head, 0.0), name)
    allocate_state(head_optimizer)
    embeddings_ND, labels_N = batch(world)
    embeddings_ND.requires_grad_()
    head.begin_step(0)
    output = head(embeddings_ND, labels_N)
    output.loss.backward()
    head.norm_bound()
    norms = [head.squared_norm(), head.update(head_optimizer, divisor=2.0, step=0)]
    head.end_step()
    assert embeddings_ND.grad is not None
    found = [output.loss, *output.metrics.values(), embeddings_ND.grad, *norms, head.num_dead(5)]
    found += [*head.parameters(), *head.statistics().values()]
    with torch.no_grad():
        embeddings_BD, labels_B = collectives.gather_labelled(*batch(world), world.group)
        judged = head.of_embeddings(embeddings_BD, labels_B)
        found += [judged.loss, *judged.metrics.values(), head.directions_CD()]
        found += [head.accuracy_by_direction(embeddings_BD, labels_B)]
        found += head.accuracy_by_centres(embeddings_BD, labels_B).values()
    return [tensor.detach() for tensor in found]


def differences(
    world: World, function: Callable[[World, Any], list[Tensor]], cases: Mapping[str, Any]
) -> dict[str, str]:
    """Return what went wrong, or otherwise, on the accelerator."""
    wrong = {}
    for name, case in cases.items():
        expected = function(world, case)
        try:
            with accelerated(world) as world_there:
                found = [on_host(tensor) for tensor in function(world_there, case)]
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # other kernels
        except Exception:
            wrong[name] = traceback.format_exc()
    return wrong


def backbone_step(world: World, config: Config) -> list[Tensor]:
    """Return embeddings and gradients."""
    torch.manual_seed(1)
    backbone = build_backbone(config.backbone, world.group).to(world.device)
    pixels = torch.arange(IMAGES * 3 * 32 * 32) % 251 + world.rank
    embeddings_ND = backbone(pixels.view(IMAGES, 3, 32, 32).to(torch.uint8).to(world.device))
    embeddings_ND.square().sum().backward()
    gradients = [p.grad for p in backbone.parameters() if p.grad is not None]
    return [embeddings_ND.detach(), *gradients, *backbone.buffers()]


def looked_into(world: World, config: Config) -> list[Tensor]:
    """Return what a report tells of a head and of a set, which is on the host."""
    head = state.build_head(config, world, DIM)
    embeddings_ND, labels_N = batch(replace(world, device=torch.device("cpu")))
    result = SetResult("test", {}, embeddings_ND, labels_N, (), None)
    view = view_head(head, [result], [], ["test"])
    return [torch.tensor(list(view.metrics.values()), device=world.device)]


class PlainEngine:
    """What the trainer needs of DeepSpeed's engine at ZeRO stage 0, for a device that DeepSpeed has not."""

    def __init__(self, config: Config, backbone: Backbone, world: World) -> None:
        self.module, self.group, self.device = backbone.to(world.device), world.group, world.device
        self.optimizer = build_optimizer(config.optim, parameter_groups(backbone, config.optim.weight_decay))
        allocate_state(self.optimizer)
        self.train, self.eval = backbone.train, backbone.eval
        self.accumulation, self.micro_steps = config.engine.accumulation_steps, 0

    def __call__(self, images_NCHW: Tensor) -> Tensor:
        return self.module(images_NCHW)

    def gradient_accumulation_steps(self) -> int:
        return self.accumulation

    def zero_optimization(self) -> bool:
        return False

    def backward(self, loss: Tensor) -> None:
        (loss / self.accumulation).backward()
        if (self.micro_steps + 1) % self.accumulation == 0:
            for gradient in [p.grad for p in self.module.parameters() if p.grad is not None]:
                gradient.copy_(collectives.sum_over(gradient, self.group) / self.group.size())

    def step(self) -> None:
        self.micro_steps += 1
        if self.micro_steps % self.accumulation == 0:
            self.optimizer.step()
            self.optimizer.zero_grad()


def trained(world: World, texts: Sequence[str]) -> list[Tensor]:
    """Train to the end, lose the second half, and train again; return what the test sets say both times."""
    config = load(None, [*texts, f"run.name={world.device.type}"])
    with (
        mock.patch.object(loop, "joined_world", return_value=nullcontext(world)),
        mock.patch.object(state, "build_engine", PlainEngine),
    ):
        first = loop.train(config)
        last = config.run_folder / "checkpoints" / "step-00000002"
        if world.is_main:
            shutil.rmtree(last)
        again = loop.train(config)
        assert last.is_dir()
    return [torch.tensor([*first.values(), *again.values()], device=world.device)]


def test_a_run_on_an_accelerator_is_that_on_the_host(tmp_path: Path) -> None:
    packed = pack_photos(tmp_path, "packed", {"ant": 9, "bee": 8, "cat": 7}, (24, 24))
    texts = options(
        tmp_path, "run", "optim.steps=2", "data.workers=0", "optim.name=adamw", "engine.accumulation_steps=2",
        "checkpoint.every_steps=1", "checkpoint.keep_last=2", "checkpoint.asynchronous=true",
        "loss.extra={triplet: 0.1, center: 0.01}", "init.centroids=class_means",
        f"eval.verification.pairs={packed}",
    )  # fmt: skip
    for wrong in run_on_ranks(differences, 2, trained, {"run": texts}):
        assert not wrong, wrong["run"]


@pytest.mark.parametrize(
    ("function", "cases"),
    [
        (step, {**{name: (*case, "optim.name=adamw") for name, case in CASES.items()}, "sgd": ()}),
        (looked_into, {name: CASES[name] for name in ("coco", "softmax", "sub-centroids", "sum")}),
        (backbone_step, {name: (f"backbone.name={name}",) for name in BACKBONES}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_accelerator_gives_what_the_host_gives(function, cases, tmp_path: Path) -> None:
    configs = {name: config_of(tmp_path, *case) for name, case in cases.items()}
    for wrong in run_on_ranks(differences, 2, function, configs):
        for name, text in wrong.items():
            pytest.fail(f"{name}, and {len(wrong) - 1} more: {text}", pytrace=False)


def mixing_fails(world: World) -> None:
    with accelerated(world) as world_there:
        here, there = torch.zeros(3, device=world_there.device), torch.zeros(3)
        assert (here + torch.tensor(1.0)).tolist() == [1.0] * 3
        with pytest.raises(AssertionError, match="tensors of the host among those of the device"):
            here + there
        with pytest.raises(AssertionError, match="a tensor of the host is sent between ranks"):
            collectives.sum_over(there, world.group)
        with pytest.raises(RuntimeError):
            here.numpy()
        parameter = nn.Parameter(here)
        parameter.grad = here
        optimizer = torch.optim.AdamW([parameter], fused=True)
        allocate_state(optimizer)
        optimizer.step()
        optimizer.state[parameter]["step"] = torch.tensor(0.0)
        with pytest.raises(AssertionError, match="tensors of the host among those of the device"):
            optimizer.step()


def test_what_is_left_on_the_host_is_found() -> None:
    run_on_ranks(mixing_fails, 2)
