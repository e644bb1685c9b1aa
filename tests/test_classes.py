"""Class changes: what stays, stays to the bit; new rows are mean features, on any number of ranks."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from launching import Started, read_metrics
from ranks import run_on_ranks
from small_run import make_run, pack_photos, random_backbone
from torch import Tensor

from trainer import classes
from trainer.augment import build_eval_transform
from trainer.checkpoint import read_rows, read_tensors
from trainer.classes import change_classes, config_for, match, write_changed
from trainer.decode import decode
from trainer.distributed import World
from trainer.errors import UserError
from trainer.feed import open_training_data
from trainer.head import ClassShard, initial_rows
from trainer.index import open_index
from trainer.trained import open_trained

OLD = {"ant": 4, "bee": 5, "cat": 3, "dog": 4, "eel": 4}
OPTIMIZER = ("optimizer.exp_avg.centroids_CD", "optimizer.exp_avg_sq.centroids_CD")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five classes, and packed sets with other classes."""
    root = tmp_path_factory.mktemp("classes")
    make_run(root, pack_photos(root, "old", OLD, (32, 32)), name="run")
    pack_photos(root, "grown", {**OLD, "ape": 5, "fox": 6}, (32, 32))
    pack_photos(root, "fewer", {"bee": 5, "eel": 4}, (32, 32))
    pack_photos(root, "single", {"bee": 2}, (32, 32))
    pack_photos(root, "other", {"cow": 3, "dog": 4, "fish": 4, "bird": 3}, (32, 32))
    return root


def rows_of(path: Path) -> dict[str, Tensor]:
    """All rows by class name: name -> (row, first moment, second moment)."""
    trained = open_trained(path)
    rows = read_rows(trained.path, ClassShard(0, trained.num_rows, trained.num_rows))
    together = torch.stack([rows[key] for key in ("parameter.centroids_CD", *OPTIMIZER)], 1)
    return dict(zip(trained.class_names, together, strict=True))


def mean_feature(root: Path, data: str, name: str) -> Tensor:
    """One image at a time, in float64."""
    index = open_index(root / data, "data")
    embed, transform = random_backbone(open_trained(root / "run").config), build_eval_transform(image_size=32)
    label = index.class_names.index(name)
    images = [i for i in range(index.num_samples) if index.labels_N[i] == label]
    with torch.no_grad():
        features = [F.normalize(embed(transform(decode(index.read(i), 3))[None]).double()) for i in images]
    return F.normalize(torch.cat(features).mean(0), dim=0)


def grow_on_rank(world: World, root: Path, out: Path) -> None:
    trained, index = open_trained(root / "run"), open_index(root / "grown", "NEW_DATA")
    change = match("grow", trained.class_names, index.class_names, {}, "data")
    write_changed(trained, change, config_for(trained.config, index, out), index, world, "mean")


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_grown_classes_leave_the_old_ones_and_the_backbone_to_the_bit(root, tmp_path, num_ranks):
    run_on_ranks(grow_on_rank, num_ranks, root, tmp_path / "new")
    before, after = rows_of(root / "run"), rows_of(tmp_path / "new")
    assert list(after) == sorted([*OLD, "ape", "fox"])  # labels have moved, names have not
    for name in OLD:
        assert torch.equal(after[name], before[name]), name
    old, new = (
        read_tensors(open_trained(p).path / "backbone.safetensors") for p in (root / "run", tmp_path / "new")
    )
    assert old.keys() == new.keys()
    assert all(torch.equal(old[key], new[key]) for key in old)

    old_rows = torch.stack(list(before.values()))
    for name in ("ape", "fox"):
        row, first_moment, second_moment = after[name]
        assert torch.dot(F.normalize(row, dim=0), mean_feature(root, "grown", name).float()) > 1 - 1e-6
        assert row.norm() == pytest.approx(float(old_rows[:, 0].norm(dim=1).mean()), rel=1e-6)
        assert torch.equal(first_moment, torch.zeros(12))
        torch.testing.assert_close(second_moment, old_rows[:, 2].mean(0))


def test_every_matrix_of_a_sum_of_losses_gets_its_new_and_merged_rows(root, tmp_path):
    """Rows of softmax, centres of center loss: directions of mean features, each as long as its own."""
    matrices = ("parts.softmax.weight_CD", "parts.center.centres.rows_CD")
    run = make_run(tmp_path, root / "old", name="sum", loss="center", matrices=matrices)
    before = read_rows(open_trained(run).path, ClassShard(0, 5, 5))
    change_classes("remap", run, root / "grown", tmp_path / "grown")
    change_classes(
        "merge", run, root / "fewer", tmp_path / "merged", renames={"ant": "eel", "cat": "eel", "dog": "eel"}
    )
    grown = read_rows(open_trained(tmp_path / "grown").path, ClassShard(0, 7, 7))
    merged = read_rows(open_trained(tmp_path / "merged").path, ClassShard(0, 2, 2))
    assert open_trained(tmp_path / "grown").class_names[1] == "ape"
    for name in (f"parameter.{matrix}" for matrix in matrices):
        old = before[name].double()
        lengths = old.norm(dim=1)
        new = grown[name][1].double()
        torch.testing.assert_close(
            new, mean_feature(root, "grown", "ape") * lengths.mean(), rtol=1e-5, atol=1e-6
        )
        parts = [0, 2, 3, 4]  # all but the bee
        expected = F.normalize(F.normalize(old[parts]).mean(0), dim=0) * lengths[parts].mean()
        torch.testing.assert_close(merged[name][1].double(), expected, rtol=1e-5, atol=1e-6)


def test_old_classes_keep_their_accuracy_when_classes_are_added(root, tmp_path):
    """Old cosines are equal, and the new rows, means of other photos, win no old image they should not."""
    change_classes("grow", root / "run", root / "grown", tmp_path / "new")
    before, after = (
        F.normalize(torch.stack([r[n][0] for n in OLD]))
        for r in map(rows_of, (root / "run", tmp_path / "new"))
    )
    index, transform = open_index(root / "old", "data"), build_eval_transform(image_size=32)
    with torch.no_grad():
        models = [open_trained(p).build_backbone() for p in (root / "run", tmp_path / "new")]
        images = torch.stack([transform(decode(index.read(i), 3)) for i in range(index.num_samples)])
        features = [F.normalize(model(images)) for model in models]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[0] @ before.T, features[1] @ after.T)


def test_dropped_classes_disappear_with_their_optimizer_rows(root, tmp_path):
    said = change_classes("drop", root / "run", root / "fewer", tmp_path / "new")
    before, after = rows_of(root / "run"), rows_of(tmp_path / "new")
    assert list(after) == ["bee", "eel"]
    assert all(torch.equal(after[name], before[name]) for name in after)
    assert (said["new"], said["dropped"], said["classes"]) == (0, 3, 2)


def test_merged_classes_have_the_mean_direction_and_the_mean_state(root, tmp_path):
    said = change_classes(
        "merge",
        root / "run",
        root / "fewer",
        tmp_path / "new",
        renames={"ant": "eel", "cat": "eel", "dog": "eel"},
    )
    before, after = rows_of(root / "run"), rows_of(tmp_path / "new")
    assert torch.equal(after["bee"], before["bee"])
    parts = torch.stack([before[name] for name in ("ant", "cat", "dog", "eel")]).double()
    direction = F.normalize(F.normalize(parts[:, 0]).mean(0), dim=0)
    expected = direction * parts[:, 0].norm(dim=1).mean()
    torch.testing.assert_close(after["eel"][0].double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(after["eel"][1:].double(), parts[:, 1:].mean(0), rtol=1e-6, atol=1e-7)
    assert (said["merged"], said["dropped"]) == (4, 0)


def test_remap_renames_drops_and_adds_at_once_with_random_rows(root, tmp_path):
    said = change_classes(
        "remap", root / "run", root / "other", tmp_path / "new", renames={"eel": "fish"}, new_rows="random"
    )
    before, after = rows_of(root / "run"), rows_of(tmp_path / "new")
    assert torch.equal(after["dog"], before["dog"])
    assert torch.equal(after["fish"], before["eel"])
    drawn = F.normalize(initial_rows(0, ClassShard(0, 4, 4), 12))
    torch.testing.assert_close(F.normalize(after["cow"][0], dim=0), drawn[list(after).index("cow")])
    assert (said["new"], said["dropped"], said["merged"]) == (2, 3, 0)


@pytest.mark.parametrize(
    ("command", "data", "renames", "message"),
    [
        ("grow", "fewer", {}, "grow: {data} lacks class 'ant' of the checkpoint; drop or remap can lose it"),
        ("drop", "grown", {}, "drop: class 'ape' of {data} is new; grow or remap can add it"),
        (
            "merge",
            "fewer",
            {},
            "merge: {data} lacks class 'ant' of the checkpoint; drop or remap can lose it",
        ),
        ("drop", "fewer", {"ant": "bee"}, "drop: --map merges 2 classes; merge or remap can do it"),
        ("remap", "fewer", {"owl": "bee"}, "--map: 'owl' is not a class of the checkpoint"),
        ("remap", "fewer", {"bee": "x", "eel": "y"}, "remap: {data} has no class of the checkpoint"),
        ("drop", "single", {}, "NEW_DATA: {data} has one class, and a head has two or more"),
    ],
)
def test_what_a_command_does_not_do_is_refused_by_the_name_of_a_class(
    root, tmp_path, command, data, renames, message
):
    with pytest.raises(UserError) as caught:
        change_classes(command, root / "run", root / data, tmp_path / "new", renames=renames)
    assert str(caught.value) == message.format(data=root / data)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    "how", [{}, {"sampler": "class_weighted", "class_power": 0.5}, {"shuffle_window": 1}]
)
def test_the_changed_checkpoint_is_of_the_data_that_training_opens(root, tmp_path, monkeypatch, how):
    trained = open_trained(root / "run")
    config = dataclasses.replace(trained.config, data=dataclasses.replace(trained.config.data, **how))
    changed = dataclasses.replace(trained, config=config)
    monkeypatch.setattr(classes, "open_trained", lambda path: changed)
    change_classes("grow", root / "run", root / "grown", tmp_path / "new", new_rows="random")
    written = open_trained(tmp_path / "new")
    assert written.record["data_fingerprint"] == open_training_data(written.config).fingerprint


def test_an_existing_run_is_not_written_into(root):
    with pytest.raises(UserError, match=r"--out: .* exists already"):
        change_classes("grow", root / "run", root / "grown", root / "run")


@pytest.mark.nightly
def test_training_goes_on_from_the_changed_checkpoint(root, tmp_path):
    command = ("launch/classes.py", "grow", root / "run", root / "grown", "--out", tmp_path / "new", "--json")
    done = Started(sys.executable, *command).wait()
    assert done.code == 0, done.stderr
    assert json.loads(done.stdout)["new"] == 2
    config = (
        "--config",
        tmp_path / "new" / "config.yaml",
        "optim.steps=9",
        "eval.classification={}",
        "eval.verification={}",
    )
    done = Started(sys.executable, "launch/train.py", *config).wait()
    assert done.code == 0, done.stderr
    assert [line["step"] for line in read_metrics(tmp_path / "new")] == [8, 9]
    assert (tmp_path / "new" / "report.html").is_file()
