"""What comes after the last step of training may fail, and must not cost what was trained; nor may it fail
for data that is odd but right."""

import json
import sys
from pathlib import Path

import pytest
from launching import Finished, Started, start_train
from PIL import Image

from trainer.manifest import complete_checkpoints

SMALL = (
    "backbone.name=lenetpp", "backbone.channels=1", "backbone.image_size=8", "data.batch_size=4",
    "data.workers=0", "optim.steps=2", "log.wandb=disabled",
)  # fmt: skip


def pack(root: Path, name: str, classes: dict[str, int]) -> Path:
    """Pack classes of plain squares by the real command."""
    for label, (class_name, count) in enumerate(classes.items()):
        for i in range(count):
            path = root / "images" / name / class_name / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 20 * (label + 1) + i).save(path)
    done = Started(
        sys.executable, "launch/pack.py", "imagefolder", root / "images" / name, root / name
    ).wait()
    assert done.code == 0, done.stderr
    return root / name


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("last")
    pack(root, "train", {"ant": 3, "bee $x^$": 3, "cat": 3})
    pack(root, "single", {"ant": 1, "bee $x^$": 1, "cat": 1})
    pack(root, "one", {"ant": 4})
    return root


def train(root: Path, name: str, *overrides: str, ranks: int = 1) -> Finished:
    place = (f"data.train={root / 'train'}", f"run.root={root}", f"run.name={name}")
    return start_train(ranks, *SMALL, *place, *overrides).wait()


def test_odd_test_sets_and_heads_are_judged_drawn_and_finished(root: Path) -> None:
    done = train(
        root,
        "odd",
        "head.num_classes=8",
        "backbone.embedding_dim=2",
        "eval.save_embeddings=true",
        f"eval.classification.single={root / 'single'}",
        f"eval.classification.one={root / 'one'}",
        f"eval.protocols.few={{protocol: closed_set, data: {root / 'single'}, ks: [1]}}",
    )
    assert done.code == 0, done.stderr
    assert "incomplete" not in done.stderr
    figures = json.loads((root / "odd" / "done.json").read_text())
    assert "eval/single/accuracy" in figures
    assert {"cosine_intra", "cosine_inter"} & {name.split("/")[-1] for name in figures} == {
        "cosine_intra", "cosine_inter",
    }  # fmt: skip
    assert "eval/single/cosine_intra" not in figures  # no two images of a class
    assert "eval/one/cosine_inter" not in figures
    assert (root / "odd" / "report.html").exists()
    drawn = Started(sys.executable, "launch/pictures.py", root / "odd").wait()
    assert drawn.code == 0, drawn.stderr
    names = {path.name for path in (root / "odd" / "figures").iterdir()}
    assert {"centroid-gram.png", "features-one.gif", "cosines-single.png", "centres-one.png"} <= names


def test_one_dimension_is_drawn_as_far_as_it_can_be(root: Path) -> None:
    done = train(root, "line", "backbone.embedding_dim=1", f"eval.classification.single={root / 'single'}")
    assert done.code == 0, done.stderr
    assert "incomplete" not in done.stderr
    assert (root / "line" / "report.html").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_broken_test_image_costs_no_training(root: Path, ranks: int) -> None:
    broken = root / f"broken-{ranks}"
    if not broken.exists():
        pack(root, broken.name, {"ant": 3, "cat": 3})
        shard = next(broken.glob("*.tar"))
        content = bytearray(shard.read_bytes())
        start = content.index(b"\x89PNG", content.index(b"\x89PNG") + 1)
        content[start : start + 4] = bytes(4)
        shard.write_bytes(content)
    name = f"safe-{ranks}"
    done = train(
        root, name, f"eval.classification.test={broken}", "checkpoint.asynchronous=true", ranks=ranks
    )
    assert done.code != 0
    assert "cannot decode" in done.stderr
    assert len(complete_checkpoints(root / name / "checkpoints")) == 1
    assert not (root / name / "done.json").exists()
    place = (f"data.train={root / 'train'}", f"run.root={root}", f"run.name={name}")
    again = start_train(1, *SMALL, *place, "checkpoint.asynchronous=true").wait()  # without that set
    assert again.code == 0, again.stderr
    assert json.loads((root / name / "done.json").read_text())["step"] == 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("eval.verification.v=ROOT/one",), "eval.verification.v: ROOT/one: no two of the 4 evaluated"),
        (("eval.verification.v=ROOT/single",), "are of the same class"),
        (("data.train=ROOT/one",), "data.train: ROOT/one has one class"),
        (
            ("eval.protocols.p={protocol: open_set, data: ROOT/none}",),
            "eval.protocols.p.data: there is no ROOT/none",
        ),
        (("eval.classification={a/b: ROOT/one}",), "eval: the name of a test set is part of file names"),
        (("run.root=ROOT/file",), "run.root, run.name: "),
    ],
)
def test_what_would_fail_then_is_refused_before_training(
    root: Path, overrides: tuple[str, ...], message: str
) -> None:
    (root / "file").touch()
    done = train(root, "refused", *(override.replace("ROOT", str(root)) for override in overrides))
    assert done.code == 2, done.stderr
    [line] = done.errors
    assert message.replace("ROOT", str(root)) in line
    assert not (root / "refused" / "metrics.jsonl").exists()
