"""Every tensor of a step is on the device of its rank: what a GPU needs, without one."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.accelerator import DEVICE, accelerator_of_two_ranks
from trainer import collectives, state
from trainer.backbone import build_backbone
from trainer.config import UNFUSED, Config
from trainer.diagnostics import view_head
from trainer.distributed import World
from trainer.evaluate import SetResult
from trainer.margins import MARGINS
from trainer.optimizer import allocate_state, build_optimizer, parameter_groups
from trainer.options import load

NUM_CLASSES, DIM, IMAGES = 11, 8, 4
CASES = {
    **{name: (f"loss.name={name}",) for name in (*MARGINS, *sorted(UNFUSED))},
    **{mining: ("loss.name=triplet", f"loss.triplet.mining={mining}") for mining in ("all", "semi_hard")},
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


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(state, "require_memory", lambda *_: None)
    with accelerator_of_two_ranks(monkeypatch) as world:
        yield world


def config_of(tmp_path: Path, *overrides: str) -> Config:
    path = tmp_path / "base.yaml"
    path.write_text(f"data: {{train: none}}\nhead: {{num_classes: {NUM_CLASSES}}}\noptim: {{steps: 1}}\n")
    return load(path, overrides)


def batch(device: torch.device = DEVICE) -> tuple[Tensor, Tensor]:
    return torch.randn(IMAGES, DIM, device=device), torch.zeros(IMAGES, dtype=torch.int64, device=device)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("case", CASES)
def test_a_step_of_every_head_stays_on_its_device(case, optimizer, world: World, tmp_path) -> None:
    config = config_of(tmp_path, f"optim.name={optimizer}", *CASES[case])
    head = state.build_head(config, world, DIM)
    name = None if config.head.optimizer == "same" else config.head.optimizer
    head_optimizer = build_optimizer(config.optim, parameter_groups(head, 0.0), name)
    allocate_state(head_optimizer)
    embeddings_ND, labels_N = batch()
    embeddings_ND.requires_grad_()
    head.begin_step(0)
    output = head(embeddings_ND, labels_N)
    output.loss.backward()
    head.norm_bound()
    norms = [head.squared_norm(), head.update(head_optimizer, divisor=2.0, step=0)]
    head.end_step()
    assert embeddings_ND.grad is not None
    found = [output.loss, *output.metrics.values(), embeddings_ND.grad, *norms, head.num_dead(5)]
    found += [*head.parameters(), *head.buffers(), *head.statistics().values()]
    assert {tensor.device for tensor in found} == {DEVICE}


@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_a_head_is_judged_on_its_device(case, world: World, tmp_path) -> None:
    head = state.build_head(config_of(tmp_path, *CASES[case]), world, DIM)
    output = head.of_embeddings(*batch())
    found = [
        output.loss,
        *output.metrics.values(),
        head.directions_CD(),
        head.accuracy_by_direction(*batch()),
    ]
    assert {tensor.device for tensor in [*found, *head.accuracy_by_centres(*batch()).values()]} == {DEVICE}
    view_head(head, [SetResult("test", {}, *batch(torch.device("cpu")), (), None)], [], ["test"])


@pytest.mark.parametrize("name", ["resnet10t", "lenetpp", "vit_tiny_patch16_224"])
def test_a_backbone_stays_on_its_device(name: str, world: World, tmp_path) -> None:
    config = config_of(tmp_path, f"backbone.name={name}", "backbone.image_size=32").backbone
    backbone = build_backbone(config, world.group)
    on_device = nn.Module.to(backbone, DEVICE)
    images_NCHW = torch.zeros(IMAGES, 3, 32, 32, dtype=torch.uint8, device=DEVICE)
    on_device(images_NCHW).sum().backward()
    assert {p.grad.device for p in on_device.parameters() if p.grad is not None} == {DEVICE}


def test_what_is_on_the_host_is_found(world: World) -> None:
    here, there = torch.zeros(3, device=DEVICE), torch.zeros(3)
    with pytest.raises(AssertionError, match="tensors of the host among those of the device"):
        here + there
    with pytest.raises(AssertionError, match="a tensor of the host is sent between ranks"):
        collectives.sum_over(there, world.group)
    optimizer = torch.optim.AdamW([nn.Parameter(here)], fused=True)
    optimizer.param_groups[0]["params"][0].grad = here
    optimizer.state[optimizer.param_groups[0]["params"][0]] = {
        "step": torch.tensor(0.0),
        "exp_avg": here,
        "exp_avg_sq": here,
    }
    with pytest.raises(AssertionError, match=r"_fused_adamw_\.default: tensors of the host"):
        optimizer.step()
