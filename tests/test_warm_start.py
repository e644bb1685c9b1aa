"""Warm starts: weights of runs and files by name, strictly; centroids as class means, on any ranks."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from small_run import make_run, pack_photos, random_backbone
from torch import Tensor, nn

from trainer import warm_start as module
from trainer.augment import build_eval_transform
from trainer.checkpoint import read_rows
from trainer.config import Config
from trainer.decode import decode
from trainer.distributed import World, joined_world
from trainer.errors import UserError
from trainer.feed import open_training_data, with_derived_fields
from trainer.head import ClassShard, CocoHead, initial_rows
from trainer.index import open_index
from trainer.margins import CosineSoftmax
from trainer.options import load
from trainer.state import TrainState, build_head
from trainer.trained import open_trained
from trainer.warm_start import warm_start, weights_for

CLASSES = {"ant": 4, "bee": 5, "cat": 3, "dog": 4, "eel": 4}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("warm")
    make_run(root, pack_photos(root, "data", CLASSES, (32, 32)), name="run")
    return root


def checkpoint_of(root: Path) -> Path:
    return open_trained(root / "run").path


def config_of(root: Path, *overrides: str) -> Config:
    return load(root / "run" / "config.yaml", overrides)


class Engine(nn.Module):
    """What warm starts see of DeepSpeed's engine, at ZeRO 0: the module, and no more."""

    device = torch.device("cpu")

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.module = backbone

    def forward(self, images: Tensor) -> Tensor:
        return self.module(images)

    def zero_optimization(self) -> bool:
        return False


def start(world: World, config: Config, seed: int = 11) -> TrainState:
    """Start a run as the loop does; its own weights, of another seed, are to be replaced."""
    index = open_index(config.data.train, "data.train")
    shard = ClassShard.of_rank(index.num_classes, world.rank, world.size)
    head = CocoHead(
        shard,
        12,
        loss=CosineSoftmax(7.0),
        seed=seed,
        group=world.group,
        sub_centroids=config.head.sub_centroids,
    )
    state = TrainState(Engine(random_backbone(config, seed)), head, torch.optim.SGD(head.parameters(), 0.1))
    warm_start(state, config, open_training_data(config), world)
    return state


def start_on_rank(world: World, *configs: Config) -> list[tuple[dict[str, Tensor], Tensor]]:
    states = [start(world, config) for config in configs]
    return [(state.engine.module.state_dict(), state.head.centroids_CD.detach()) for state in states]


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("num_ranks", [1, 3])
def test_a_run_begins_with_the_weights_of_another_and_with_class_means(root, num_ranks):
    """Once with the rows of the other run, and once with rows that are the mean features of their classes."""
    config = config_of(root, f"init.from={root / 'run'}", "init.head=true")
    with_means = config_of(root, f"init.from={root / 'run'}", "init.centroids=class_means")
    results = run_on_ranks(start_on_rank, num_ranks, config, with_means)
    for weights, _ in (result for results_of_rank in results for result in results_of_rank):
        assert_same(weights, random_backbone(config).state_dict())
    loaded, means = (torch.cat([rows for _, rows in parts]) for parts in zip(*results, strict=True))
    assert torch.equal(loaded, read_rows(checkpoint_of(root), ClassShard(0, 5, 5))["parameter.centroids_CD"])

    index, transform = open_index(root / "data", "data"), build_eval_transform(image_size=32)
    embed = random_backbone(config).double()
    sums = torch.zeros(5, 12, dtype=torch.float64)
    with torch.no_grad():
        for i in range(index.num_samples):
            image = transform(decode(index.read(i), 3))[None]
            sums[int(index.labels_N[i])] += F.normalize(embed(image))[0]
    torch.testing.assert_close(means, F.normalize(sums).float(), rtol=0, atol=2e-6)


def test_a_class_without_images_keeps_its_random_row_and_sub_centroids_differ(root, monkeypatch):
    means = F.normalize(torch.randn(5, 12, generator=torch.Generator().manual_seed(0)))
    means[2] = 0

    def class_means(*_: Any) -> tuple[Tensor, Tensor]:
        return means, torch.tensor([1, 2, 0, 3, 1])

    monkeypatch.setattr(module, "class_means", class_means)
    config = config_of(root, "init.centroids=class_means", "head.sub_centroids=2")
    with joined_world(60) as world:
        rows = start(world, config).head.centroids_CD.detach().unflatten(0, (5, 2))
    random = initial_rows(11, ClassShard(0, 10, 10), 12).unflatten(0, (5, 2))
    assert torch.equal(rows[2], random[2])
    kept = [0, 1, 3, 4]
    torch.testing.assert_close(rows[kept, 0], means[kept])
    nearness = (rows[kept, 1] * means[kept]).sum(1)
    assert ((nearness > 0.95) & (nearness < 0.9999)).all()


@pytest.mark.parametrize("kind", ["checkpoint", "its file", "names of the module"])
def test_weights_are_found_wherever_they_lie(root, tmp_path, kind):
    config = config_of(root)
    expected = random_backbone(config).state_dict()
    source = checkpoint_of(root)
    if kind == "its file":
        source /= "backbone.safetensors"
    elif kind == "names of the module":
        source = tmp_path / "weights.safetensors"
        save_file(expected, source)
    assert_same(weights_for(random_backbone(config, 12), source), expected)


def test_a_file_of_timms_sets_the_network_and_leaves_the_neck(root, tmp_path):
    from trainer.export import export  # which ranks need not import

    out = export(root / "run", tmp_path / "out").folder
    config = config_of(root)
    expected = random_backbone(config).state_dict()
    found = weights_for(random_backbone(config, 12), out / "model.safetensors")
    assert_same(found, {name: value for name, value in expected.items() if name.startswith("network.")})


def refused(backbone: nn.Module, source: Path) -> str:
    with pytest.raises(UserError) as caught:
        weights_for(backbone, source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_names_and_shapes_are_refused_in_one_line(root, tmp_path):
    config = config_of(root)
    wider = dataclasses.replace(config, backbone=dataclasses.replace(config.backbone, embedding_dim=13))
    path = checkpoint_of(root)
    message = f"init.from: {path}: neck.2.bias is [12] there and [13] here"
    assert refused(random_backbone(wider), path) == message
    weights = load_file(path / "backbone.safetensors")
    del weights["parameter.network.conv1.0.weight"]
    save_file(weights, tmp_path / "less.safetensors")
    message = f"init.from: {tmp_path / 'less.safetensors'}: network.conv1.0.weight is missing there and"
    assert refused(random_backbone(config), tmp_path / "less.safetensors").startswith(message)
    assert refused(random_backbone(config), tmp_path / "none").startswith(f"{tmp_path / 'none'}: cannot read")


def test_a_head_of_other_classes_is_refused_by_name(root, tmp_path):
    other = pack_photos(tmp_path, "other", {**CLASSES, "eel": 4, "cow": 3}, (32, 32))
    config = config_of(root, f"init.from={root / 'run'}", "init.head=true", f"data.train={other}")
    with joined_world(60) as world, pytest.raises(UserError) as caught:
        start(world, config)
    expected = f"init.head: {root / 'run'}: class 3 is 'dog' there and 'cow' here; launch/classes.py makes a"
    assert str(caught.value).startswith(expected)


@pytest.mark.parametrize(
    "overrides", [("init.head=true",), ("init.head=true", "init.from=x", "init.centroids=class_means")]
)
def test_contradictions_are_refused(root, overrides):
    with pytest.raises(UserError, match=r"init.head: needs init.from, and init.centroids=random"):
        config_of(root, *overrides)


@pytest.mark.parametrize("name", ["triplet", "standalone_center"])
def test_class_means_for_a_loss_without_directions_are_refused(root, name):
    expected = rf"^init\.centroids: class_means needs a loss with rows of directions, got {name}$"
    with pytest.raises(UserError, match=expected):
        config_of(root, "init.centroids=class_means", f"loss.name={name}")


def test_class_means_point_rows_and_leave_centres_and_what_tells_them_apart(root):
    sum_of = "loss.extra={standalone_center: 1, softmax: 1, center: 0.1}"
    apart = "loss.standalone_center.inter=classifier"
    config = config_of(root, "init.centroids=class_means", sum_of, apart)
    data, rows = open_training_data(config), {}
    with joined_world(60) as world:
        head = build_head(with_derived_fields(config, data), world, 12)
        state = TrainState(Engine(random_backbone(config)), head, torch.optim.SGD(head.parameters(), 0.1))
        for how in ("random", "class_means"):
            rows[how] = {name: p.detach().clone() for name, p in head.named_parameters() if p.ndim > 1}
            warm_start(state, config, data, world)
    moved = {name for name, row in rows["random"].items() if not torch.equal(row, rows["class_means"][name])}
    assert moved == {"parts.coco.centroids_CD", "parts.softmax.weight_CD"}
    assert len(rows["random"]) == 5
