"""Evaluation against brute force, on real ranks: uneven sets, labels matched by name, every rank agrees."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from ranks import run_on_ranks
from torch import Tensor

from trainer.config import Config, ProtocolConfig, from_dict
from trainer.distributed import World
from trainer.errors import UserError
from trainer.evaluate import EvalSets
from trainer.head import ClassShard, CocoHead, initial_rows
from trainer.margins import CosineSoftmax
from trainer.shards import write_shards
from trainer.sources import image_folder, shuffled

TRAINED = ("ant", "bee", "cat", "dog", "eel")


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``some``: 13 images of three trained classes; ``new``: 17 of four others; ``odd``: a stranger."""
    root = tmp_path_factory.mktemp("sets")
    generator = np.random.default_rng(1)
    counts = {
        "some": {"bee": 4, "dog": 5, "eel": 4},
        "new": {"a": 4, "b": 5, "c": 3, "d": 5},
        "odd": {"bee": 1, "fox": 1},
    }
    for name, classes in counts.items():
        for label, count in classes.items():
            for i in range(count):
                path = root / "images" / name / label / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(generator.integers(0, 256, (4, 4), dtype=np.uint8)).save(path)
        source = image_folder(root / "images" / name)
        write_shards(shuffled(source), root / name, source.class_names)
    return root


def config_of(root: Path, **sets: dict[str, str]) -> Config:
    folders = {kind: {name: root / name for name in names} for kind, names in sets.items()}
    return from_dict(
        {
            "data": {"train": "none", "workers": 0},
            "backbone": {"name": "lenetpp", "image_size": 4, "channels": 1},
            "eval": {**folders, "batch_size": 5},
        }
    )


def embed(images_NCHW: Tensor) -> Tensor:
    """A fixed projection, float64 inside, so that batches and ranks cannot change a bit of it."""
    projection = torch.randn(16, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    return ((images_NCHW.flatten(1).double() - 128) @ projection).float()


def evaluate_on_rank(world: World, root: Path) -> list[Any]:
    config = config_of(root, classification=["some"], verification=["new"])
    shard = ClassShard.of_rank(len(TRAINED), world.rank, world.size)
    head = CocoHead(shard, 6, loss=CosineSoftmax(7.0), seed=0, group=world.group)
    results = EvalSets(config, world, TRAINED, len(TRAINED)).evaluate(embed, head)
    return [(r.metrics, r.embeddings_ND, r.labels_N, r.class_names) for r in results]


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_metrics_equal_brute_force_on_any_number_of_ranks(sets: Path, num_ranks: int) -> None:
    by_rank = run_on_ranks(evaluate_on_rank, num_ranks, sets)
    for results in by_rank[1:]:
        assert [metrics for metrics, *_ in results] == [metrics for metrics, *_ in by_rank[0]]

    (known, x_ND, labels_N, names), (new, y_ND, new_labels_N, _) = by_rank[0]
    assert sorted(labels_N.tolist()) == [0] * 4 + [1] * 5 + [2] * 4
    truth_N = torch.tensor([TRAINED.index(names[label]) for label in labels_N])
    rows_KD = initial_rows(0, ClassShard(0, 5, 5), 6).double()
    z_NK = 7.0 * F.normalize(x_ND.double()) @ F.normalize(rows_KD).T
    assert known["eval/some/loss"] == pytest.approx(float(F.cross_entropy(z_NK, truth_N)), rel=1e-5)
    accuracy = float((z_NK.argmax(1) == truth_N).double().mean())
    assert known["eval/some/accuracy"] == pytest.approx(accuracy)
    assert known["eval/some/nearest_centroid"] == pytest.approx(accuracy)

    cosine_NN = F.normalize(y_ND.double()) @ F.normalize(y_ND.double()).T
    cosine_NN.fill_diagonal_(-2)
    nearest = new_labels_N[cosine_NN.argmax(1)]
    assert new["eval/new/rank1"] == pytest.approx(float((nearest == new_labels_N).double().mean()))
    assert "eval/new/tar@far=1e-1" in new


def judge_on_rank(world: World, root: Path) -> dict[str, float]:
    config = config_of(root, classification=["some"])
    protocol = ProtocolConfig(protocol="closed_set", data=root / "some")
    config = replace(config, eval=replace(config.eval, protocols={"again": protocol}))
    shard = ClassShard.of_rank(len(TRAINED), world.rank, world.size)
    head = CocoHead(shard, 6, loss=CosineSoftmax(7.0), seed=0, group=world.group, sub_centroids=2)
    results = list(EvalSets(config, world, TRAINED, len(TRAINED)).evaluate(embed, head))
    return {name: value for result in results for name, value in result.metrics.items()}


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_the_closed_set_protocol_knows_the_classes_of_the_head_in_training(
    sets: Path, num_ranks: int
) -> None:
    for values in run_on_ranks(judge_on_rank, num_ranks, sets):
        assert values["eval/again/num_images"] == 13
        assert values["eval/again/accuracy"] == pytest.approx(values["eval/some/accuracy"])


def open_on_rank(world: World, config: Config, class_names: tuple[str, ...], num_classes: int) -> str:
    with pytest.raises(UserError) as caught:
        EvalSets(config, world, class_names, num_classes)
    return str(caught.value)


def test_a_class_that_was_not_trained_is_refused_by_name(sets: Path) -> None:
    config = config_of(sets, classification=["odd"])
    [message] = run_on_ranks(open_on_rank, 1, config, TRAINED, 5)
    assert message.startswith("eval.classification.odd: class 'fox' of ")


def test_without_names_a_label_beyond_the_head_is_refused(sets: Path) -> None:
    config = config_of(sets, classification=["some"])
    [message] = run_on_ranks(open_on_rank, 1, config, (), 2)
    assert message.endswith("has label 2, the head has 2 classes")
